import torch

from atlasvid_cli.errors import ExitCode, InputError, explain


def test_torchs_own_out_of_memory_is_a_resource_error():
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        message, code = explain(error)
    assert code == ExitCode.RESOURCE and "--res" in message and "--offload" in message


def test_others_keep_their_code():
    assert explain(InputError("a file")) == ("a file", ExitCode.INPUT)
    assert explain(ValueError("x"))[1] == ExitCode.RENDER
