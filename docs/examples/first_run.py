"""An ordinary training loop with the three lines of zerompi.

    mpiexec -n 4 python first_run.py

Learns the sum of 16 numbers. Rank 0 prints; the loss is that of rank 0's part of the batch.
"""

from __future__ import annotations

import torch
from torch import nn

import zerompi

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
zero = zerompi.partition(model, optimizer, stage=3)  # 1

for step in range(1, 101):
    torch.manual_seed(step * zero.size + zero.rank)  # each rank its own batch
    x = torch.randn(32, 16)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    loss.backward()
    zero.clip_grad_norm_(1.0)  # 2
    optimizer.step()
    optimizer.zero_grad()
    if zero.rank == 0 and step % 25 == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)

zero.save("first-run/step-100")  # 3
