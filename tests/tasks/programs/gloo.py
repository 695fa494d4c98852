"""A rank that sums its number over all ranks, and counts its threads."""

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
print(f"sum {total.item()}, {torch.get_num_threads()} thread", flush=True)
dist.destroy_process_group()
