"""Spellings of earlier versions, which still work on the command line and in recipes."""

OLD_COMMANDS = {"removed": "excluded"}
OLD_OPTIONS = {
    "cluster": {"clusters": "k"},
    "dedup": {"clusters-name": "clustering", "keep": "order"},
    "plan": {"clusters": "clustering"},
    "explain": {"clusters": "by-cluster"},
    "import": {"clusters-name": "clustering"},
}


def new_spelling(command: str, option: str) -> str:
    """Return the present name of a command's option, without dashes."""
    return OLD_OPTIONS.get(command, {}).get(option, option)
