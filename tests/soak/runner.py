"""Runs tailwise commands in forked children, and kills them: started by the tests of this folder, spoken to in lines of JSON.

Python and all libraries are imported once, here. Each command runs in a child, which costs some milliseconds in place of seconds:
modules that a command imports are imported here too once it has ended, for the next one.
The process may run in a mount namespace of its own (`unshare --user --map-root-user --mount`), where it mounts small disks.
"""

import gc
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

# Events of Python's audit hooks after which the disk differs.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


def counted(event, arguments):
    """Whether an audit event changes the disk."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(set(mode or "") & set("wax+")) or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
    return event in CHANGES


def execute(request, started):
    """In the child: runs the command, writes down what it came to, and ends the process."""
    os.setsid()
    for name, number in (("out", 1), ("err", 2)):
        handle = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    count, limit, known = 0, request.get("kill_at"), set(sys.modules)

    def hook(event, arguments):
        nonlocal count
        if counted(event, arguments):
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    if "kill_at" in request:
        sys.addaudithook(hook)
    code = 1
    os.write(started, b"s")
    try:
        sys.argv = ["tailwise", *request["argv"]]
        from tailwise.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  (as the interpreter would)
        traceback.print_exc()
    events, limit = count, None
    sys.stdout.flush()
    sys.stderr.flush()
    Path(request["facts"]).write_text(json.dumps({"events": events, "modules": sorted(set(sys.modules) - known)}))
    os._exit(code)


def run(request):
    """Runs one command in a child: {code, hit, late, events, seconds, peak_bytes, out, err}; hit: killed before the command ended."""
    facts = Path(request["facts"])
    facts.unlink(missing_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        execute(request, writing)
    os.close(writing)
    os.read(reading, 1)  # the command begins, or the child has ended
    os.close(reading)
    began = time.monotonic()
    limit = began + request.get("timeout", 120)
    kill = began + request["kill_after"] if request.get("kill_after") is not None else None
    late = False
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        now = time.monotonic()
        if pid:
            break
        if now > limit or (kill is not None and now > kill):
            late = now > limit
            os.killpg(child, signal.SIGKILL)
            kill, limit = None, now + 1e9
        time.sleep(0.0005 if kill is not None else 0.002)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers that it left
    code = os.waitstatus_to_exitcode(status)
    found = json.loads(facts.read_text()) if code >= 0 else {"events": None, "modules": []}
    for module in found["modules"]:
        with suppress(Exception):  # made while the command ran, such as those of a recipe
            importlib.import_module(module)
    return {
        "code": code,
        "hit": code == -signal.SIGKILL and not late and not facts.exists(),
        "late": late,
        "events": found["events"],
        "seconds": now - began,
        "peak_bytes": usage.ru_maxrss * 1024,
        "out": Path(request["out"]).read_text(errors="replace"),
        "err": Path(request["err"]).read_text(errors="replace"),
    }


def tree(request):
    """Returns the hash of each file below some folders."""
    found = {}
    for root in request["folders"]:
        for path in sorted(Path(root).rglob("*")):
            if path.is_file():
                found[str(path)] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return found


def copy(request):
    """Makes a folder a copy of another one, times included."""
    shutil.rmtree(request["to"], ignore_errors=True)
    shutil.copytree(request["from"], request["to"], symlinks=True, dirs_exist_ok=True)


def disk(request):
    """Mounts a disk of a size, or gives a mounted one another size."""
    options = f"size={request['size']}"
    if os.path.ismount(request["at"]):
        options = f"remount,{options}"
    Path(request["at"]).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", request["at"]], check=True, capture_output=True)


def unmount(request):
    """Takes a disk away."""
    subprocess.run(["umount", "-l", request["at"]], check=True, capture_output=True)


def used(request):
    """Returns the bytes that a disk holds."""
    facts = os.statvfs(request["at"])
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def flip(request):
    """Flips one bit of a file."""
    path, chosen = Path(request["path"]), random.Random(request["seed"])
    content = bytearray(path.read_bytes())
    at = chosen.randrange(min(len(content), request.get("first", len(content))))
    content[at] ^= 1 << chosen.randrange(8)
    path.chmod(0o644)
    path.write_bytes(content)
    return at


OPERATIONS = {function.__name__: function for function in (run, tree, copy, disk, unmount, used, flip)}


def main():
    """Answers requests until the input ends."""
    import tailwise.cli  # noqa: F401

    for module in sys.argv[1:]:
        __import__(module)
    gc.collect()
    gc.freeze()  # forks of this process need not copy what they only look at
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": OPERATIONS[request.pop("operation")](request)}
        except Exception as error:  # noqa: BLE001
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
