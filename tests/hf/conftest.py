"""Marks the tests of the suites that are expected to fail, and registers the markers of the suites."""

from fnmatch import fnmatch

import pytest

from tests.hf.expected_failures import EXPECTED_FAILURES

MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: used by the test suites of transformers")


def pytest_collection_modifyitems(items):
    """Marks the tests of the table as strict xfail: one that passes fails the run, so that its entry is removed."""
    for item in items:
        for pattern, reason in EXPECTED_FAILURES.items():
            if fnmatch(item.nodeid.split("::", 1)[-1].replace("::", "."), pattern):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
