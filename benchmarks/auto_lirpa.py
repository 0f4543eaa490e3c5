"""auto_LiRPA's side of `benchmarks/certify.py`: it wants an old torch, so it runs in a Python of its own.

    python3 -m venv FOLDER && FOLDER/bin/pip install torch==1.13.1 numpy==1.26.4 appdirs pyyaml ninja packaging
    FOLDER/bin/pip install --no-deps auto_LiRPA==0.3
    TMLCOURSE_LIRPA=FOLDER/bin/python python3 course.py bench --only certify        (Linux, Python 3.8 to 3.11)

Reads a file of numpy arrays (the weights by name, images x, labels y, eps, threads) and answers each line
of its input with the seconds that CROWN's margins took and their sum.
"""

import sys
import time
import warnings

import numpy as np
import torch
from auto_LiRPA import BoundedModule, BoundedTensor
from auto_LiRPA.perturbations import PerturbationLpNorm
from torch import nn


def main():
    warnings.filterwarnings("ignore")
    given = {name: torch.from_numpy(value) for name, value in np.load(sys.argv[1]).items()}
    threads, eps, x, y = int(given["threads"]), float(given["eps"]), given["x"], given["y"]
    torch.set_num_threads(threads)
    net = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
                        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10))  # fmt: skip
    net.load_state_dict({name: given[name] for name in net.state_dict()})
    bounded = BoundedModule(net, torch.zeros_like(x), bound_opts={"conv_mode": "patches"})
    eye = torch.eye(10)
    rivals = (eye[y][:, None] - eye)[~torch.eye(10, dtype=torch.bool)[y]].view(len(x), 9, 10)
    region = PerturbationLpNorm(norm=np.inf, x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1))
    now = time.process_time if threads == 1 else time.perf_counter
    for _ in sys.stdin:
        began = now()
        with torch.no_grad():
            low, _ = bounded.compute_bounds((BoundedTensor(x, region),), C=rivals, method="backward", bound_upper=False)
        print(f"answer {now() - began} {low.sum().item()}", flush=True)


if __name__ == "__main__":
    main()
