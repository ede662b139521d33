import signal

import pytest

from cifar_assets.contracts import EXIT_BAD_SPEC, EXIT_RESUME
from cifar_assets.training.launch import exit_code

KILLED, TOLD = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([EXIT_RESUME, EXIT_RESUME], EXIT_RESUME),
        ([KILLED, EXIT_RESUME], EXIT_RESUME),
        ([EXIT_RESUME, 0], EXIT_RESUME),
        ([TOLD, EXIT_BAD_SPEC], EXIT_BAD_SPEC),
        ([1, EXIT_RESUME], 1),
        ([1, TOLD], 1),
    ],
)
def test_a_process_that_failed_by_itself_decides(codes: list[int], expected: int):
    assert exit_code(codes) == expected
