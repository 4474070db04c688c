from __future__ import annotations

import pytest
import torch

from gptq_cli.devices.attention import attention_without_plans


@pytest.mark.parametrize("enabled", [True, False])
def test_what_was_set_comes_back(enabled: bool) -> None:
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        with pytest.raises(KeyError), attention_without_plans():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
