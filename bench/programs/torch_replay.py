"""A replay buffer of torch tensors: observations of four frames, and their successors."""

import sys

try:
    import torch
    from torch import nn
except ImportError:
    sys.exit(77)

N, SIDE = 6_000, 64
torch.manual_seed(0)
observations = torch.zeros(N, 4, SIDE, SIDE, dtype=torch.uint8)
successors = torch.zeros(N, 4, SIDE, SIDE, dtype=torch.uint8)
rewards = torch.zeros(N)
network = nn.Sequential(
    nn.Conv2d(4, 16, 8, stride=4),
    nn.ReLU(),
    nn.Conv2d(16, 32, 4, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.LazyLinear(1),
)
optimizer = None
total = 0.0
frames = torch.randint(0, 256, (4, SIDE, SIDE), dtype=torch.uint8)
# The last third of the steps overwrites the oldest.
for step in range(N * 3 // 2):
    i = step % N
    observations[i] = frames
    frames = torch.cat([frames[1:], torch.randint(0, 256, (1, SIDE, SIDE), dtype=torch.uint8)])
    successors[i] = frames
    rewards[i] = float(frames[-1, 0, 0]) / 256
    if step % 16 == 15:
        chosen = torch.randint(0, min(step + 1, N), (32,))
        values = network(observations[chosen] / 255.0)
        with torch.no_grad():
            wanted = rewards[chosen, None] + 0.9 * network(successors[chosen] / 255.0)
        optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.01)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(values, wanted)
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
print(f"{total:.4f}")
