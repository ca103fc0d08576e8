import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Torch's own generator, which inputs are drawn from, starts each test anew."""
    torch.manual_seed(0)
