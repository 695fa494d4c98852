"""A rank that sums its number over all ranks."""

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
print(f"sum {total.item()}", flush=True)
dist.destroy_process_group()
