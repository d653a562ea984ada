"""Imports in this process."""

import pytest

from tailwise.steps.importing.pool import PART_ROWS, import_pool


@pytest.fixture
def run(tmp_path, request):
    """`run(*sources, **options)` → the report of an import into `tmp_path / "catalog"`, with parts of the module's PART_ROWS."""

    def imported(*sources, **options):
        part_rows = getattr(request.module, "PART_ROWS", PART_ROWS)
        options = {"part_rows": part_rows, "max_rejected": 1.0, **options}  # the lists of rejects are what is tested
        return import_pool([str(source) for source in sources], tmp_path / "catalog", workers=1, **options)

    return imported
