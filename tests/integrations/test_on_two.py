"""On two processes the weights are those of one that sees the whole batch."""

import pytest
import torch
import torch.multiprocessing as mp

import on_two
import test_transformers as hugging_face
from loops import OPTIONS, plain_loop, same, weights

pytestmark = pytest.mark.long  # two processes; `tests/distributed/test_within.py` has what the wrappers do


@pytest.fixture(scope="module")
def came(tmp_path_factory):
    """What each rank's weights came to, by integration and options."""
    context, folder = mp.get_context("spawn"), str(tmp_path_factory.mktemp("two"))
    outbox = context.Queue()
    processes = [context.Process(target=on_two.serve, args=(r, folder, outbox), daemon=True) for r in range(2)]
    for process in processes:
        process.start()
    found, ended = {}, 0
    while ended < 2:
        rank, what, options, result = outbox.get(timeout=120)
        ended += not what
        found[rank, what, options] = result
    for process in processes:
        process.join(20)
        process.kill()
    return found


def both(came, what, options):
    for rank in range(2):
        result = came[rank, what, options]
        assert isinstance(result, dict), result
        yield {n: torch.from_numpy(p) for n, p in result.items()}


@pytest.mark.parametrize("options", OPTIONS)
def test_lightning(came, options):
    expected = plain_loop(on_two.EXACT | OPTIONS[options])[0]
    for own in both(came, "lightning", options):
        same(own, expected, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_accelerate(came, options):
    expected = plain_loop(on_two.EXACT | OPTIONS[options], batch=24)[0]
    for own in both(came, "accelerate", options):
        same(own, expected, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_transformers(came, options, tmp_path):
    model = hugging_face.gpt2()
    opt = hugging_face.kfac(model, OPTIONS[options] | {"matmul_precision": "highest"})
    hugging_face.trainer(model, opt, tmp_path).train()
    for own in both(came, "transformers", options):
        same(own, weights(model), atol=1e-8)
