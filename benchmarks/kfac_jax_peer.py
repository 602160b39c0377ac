"""kfac-jax on the autoencoders, from the same weights and images, in an environment of its own:

python -m venv jax && jax/bin/pip install kfac-jax==0.0.8 jax==0.4.38 jaxlib==0.4.38
python -m benchmarks.export curves --seeds 0
jax/bin/python benchmarks/kfac_jax_peer.py "curves seed 0.npz" --damping 1 10 100 --out natgrad-study/peers

All that it can adapt is left to adapt; the first damping, which it cannot, is tuned. Compilation takes no part in the
time. The runs land in the folder `others` of a study's, whose report then has them too: `natgrad study peers`.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

EVALUATIONS = 60


def logits_of(params, x):
    for i, (W, b) in enumerate(params):
        x = jnp.dot(x, W) + b
        if i not in (len(params) // 2 - 1, len(params) - 1):
            x = jax.nn.sigmoid(x)
    return x


def cross_entropy(params, batch):
    x, _ = batch
    logits = logits_of(params, x)
    kfac_jax.register_multi_bernoulli_predictive_distribution(logits, x)
    return jnp.mean(jnp.sum(jnp.logaddexp(0.0, logits) - x * logits, 1))


@jax.jit
def evaluate(params, x):
    logits = logits_of(params, x)
    loss = jnp.mean(jnp.sum(jnp.logaddexp(0.0, logits) - x * logits, 1))
    return loss, jnp.mean(jnp.sum((jax.nn.sigmoid(logits) - x) ** 2, 1))


def run(data, damping: float, size: int, seconds: float) -> dict:
    images, seed = data["images"], int(data["seed"])
    depth = sum(k.startswith("W") for k in data.files)
    params = [(jnp.asarray(data[f"W{i}"].T), jnp.asarray(data[f"b{i}"])) for i in range(depth)]
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(cross_entropy),
        l2_reg=float(data["weight_decay"]),
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        min_damping=1e-4,
        num_burnin_steps=0,
        multi_device=False,
    )
    rng = np.random.default_rng(seed)

    def batches():
        while True:
            order = rng.permutation(len(images))
            for start in range(0, len(images) - size + 1, size):
                x = images[order[start : start + size]]
                yield x, np.zeros(size, np.float32)

    source, key = batches(), jax.random.PRNGKey(seed)
    state = optimizer.init(params, key, next(source))
    copies = jax.tree_util.tree_map(jnp.copy, (params, state))
    warm, warm_state = copies  # compiled on copies, which are thrown away
    for i in range(12):
        warm, warm_state, _ = optimizer.step(warm, warm_state, key, batch=next(source), global_step_int=i)
    jax.block_until_ready(warm)
    curve, spent, due, steps = [], 0.0, 0.0, 0
    while True:
        done = spent >= seconds
        if done or spent >= due:
            loss, error = (float(v) for v in evaluate(params, images[:2000]))
            curve.append({"step": steps, "seconds": spent, "squared error": error, "loss": loss})
            due = spent + seconds / EVALUATIONS
        if done or not np.isfinite(curve[-1]["loss"]):
            return {"curve": curve, "seed": seed}
        batch = next(source)
        key, own = jax.random.split(key)
        start = time.perf_counter()
        params, state, _ = optimizer.step(params, state, own, batch=batch, global_step_int=steps)
        jax.block_until_ready(params)
        spent += time.perf_counter() - start
        steps += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what `python -m benchmarks.export` wrote")
    parser.add_argument("--damping", type=float, nargs="+", default=[1.0, 10.0, 100.0])
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("natgrad-study/peers"), help="folder of the study")
    options = parser.parse_args()

    data = np.load(options.data)
    for damping in options.damping:
        came = run(data, damping, options.batch, options.seconds)
        setting = {"damping": damping, "batch": options.batch}
        whole = {
            "task": str(data["task"]),
            "figure": "squared error",
            "optimizer": "kfac-jax",
            "setting": setting,
            "machine": f"{platform.processor() or platform.machine()}, jax {jax.__version__}",
            **came,
        }
        name = f"{whole['task']} {options.seconds:g}s kfac-jax damping={damping:g} seed {whole['seed']}.json"
        (options.out / "others").mkdir(parents=True, exist_ok=True)
        (options.out / "others" / name).write_text(json.dumps(whole))
        last = came["curve"][-1]
        pace = 1e3 * last["seconds"] / max(1, last["step"])
        print(f"{name}: {last['step']} steps, {pace:.1f} ms/step, {last['squared error']:.3f}")


if __name__ == "__main__":
    main()
