"""Four torch models over one frozen backbone, whose heads learn; a target and an average (EMA)."""

import copy
import sys

try:
    import torch
    from torch import nn
except ImportError:
    sys.exit(77)

torch.manual_seed(0)
WIDTH = 1024
backbone = nn.Sequential(*(m for _ in range(21) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
backbone.requires_grad_(False)
models = [nn.Sequential(copy.deepcopy(backbone), nn.Linear(WIDTH, 10)) for _ in range(4)]
target, average = copy.deepcopy(models[0]), copy.deepcopy(models[0])
optimizers = [torch.optim.Adam(model[1].parameters()) for model in models]
x, y = torch.randn(64, WIDTH), torch.randint(0, 10, (64,))
total = 0.0
for step in range(40):
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        average[1].weight.lerp_(models[0][1].weight, 0.1)
        average[1].bias.lerp_(models[0][1].bias, 0.1)
        total += float(target(x).abs().sum()) + float(average(x).abs().sum())
    if step % 20 == 19:
        target[1].load_state_dict(models[0][1].state_dict())
print(f"{total:.4f}")
