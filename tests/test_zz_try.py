import time, json
from worlds import run_world
from dtrain import train
import pytest


@pytest.mark.parametrize(
    "steps,lr,h,w", [(12, 1.0, 32, 20), (150, 1.5, 32, 30), (200, 2.0, 32, 40), (200, 1.5, 64, 40)]
)
def test_x(toy, steps, lr, h, w):
    c = toy(
        "run",
        run__max_steps=steps,
        model__hidden_dim=h,
        model__dropout=0.0,
        optimizer__learning_rate=lr,
        schedule__warmup_steps=w,
        validation__every_steps=steps,
        validation__beam_size=2,
        metrics__every_steps=steps,
        model__feed_forward_dim=2 * h,
    )
    t = time.time()
    run_world(1, train.run, c)
    print(steps, lr, h, time.time() - t)
    print((c.run_dir / "metrics.jsonl").read_text())
    print((c.run_dir / "samples.jsonl").read_text()[:1500])
