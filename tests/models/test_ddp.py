"""Under DistributedDataParallel two processes find the gradients of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from itertools import product
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from performers import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

dist.init_process_group("gloo")
rank = dist.get_rank()
ids = torch.randint(4, 24, (4, 60), generator=torch.Generator().manual_seed(0))
mask = torch.arange(60) < torch.tensor([60, 41, 60, 41])[:, None]
ATTENTION = {
    False: (["favor", "exact", "favor"], {"favor": {"kernel": "softmax", "num_features": 32}}),
    True: ("favor", {"kernel": "softmax", "num_features": 32}),
}
for kind, reversible in product((PerformerForMaskedLM, PerformerForCausalLM), ATTENTION):
    torch.manual_seed(0)
    attention, kwargs = ATTENTION[reversible]
    config = PerformerConfig.preset("tiny", num_hidden_layers=3, attention=attention, attention_kwargs=kwargs,
                                    reversible=reversible)
    model = kind(config).train()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    alone = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    mine = slice(2 * rank, 2 * rank + 2)
    wrapped(input_ids=ids[mine], attention_mask=mask[mine], labels=ids[mine]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, alone[name], rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
"""


def test_gradients_of_two_processes_equal_those_of_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
