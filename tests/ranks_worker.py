"""What torchrun starts for test_ranks.py: gradients FILE | runs ARGUMENTS_OF_A_RUN_AS_JSON … | without_pages (the same)
| fragile (the same).
"""

import json
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import experiment  # noqa: E402
import variants  # noqa: E402
from tests import OWN_VARIANTS, small_run  # noqa: E402
from tests.flow.test_golden import RECIPES  # noqa: E402
from variants import base  # noqa: E402
from variants.kit import ranks, steps  # noqa: E402
from variants.kit.hyper import hyperparameters  # noqa: E402

D, F, B, DEAD = 16, 192, 64, 40


def gradients(file: str) -> int:
    """For each data-parallel variant what a step gives on a whole batch in one process, and on its halves on two."""
    torch.set_default_dtype(torch.float64)
    ranks.join("cpu")
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(1)).double() / D**0.5
    found = {}
    for way in [*OWN_VARIANTS, *RECIPES]:
        name, given = RECIPES.get(way, (way, {}))
        if not variants.load(name).SAE.data_parallel:
            continue
        for together in (False, True):
            ranks.train_together(together)
            mine_BD = x_BD.chunk(ranks.sharing())[ranks.number() % ranks.sharing()]
            torch.manual_seed(0)
            module = variants.load(name)  # few features a token: the sparse path of a CPU, with its transposed gradient
            few = {"k": 4} if "k" in hyperparameters(module) else {}
            sae = variants.build(module, D, F, few | given).double()
            sae.initialise(x_BD)
            with torch.no_grad():
                sae.W_dec += 0.1 * torch.randn(F, D)  # else residuals hardly differ between tokens
            sae.tokens_since_fired[:DEAD] = 10**9
            progress = base.Progress(90, 100, 90 * B, 100 * B)  # theta moves, penalties are whole
            loss, terms = steps.gradients(sae, base.Batch(mine_BD), progress, print)
            ranks.average_gradients(sae)
            sae.count_step(len(mine_BD))
            with torch.no_grad():
                sae.after_step(base.Batch(mine_BD), progress)
            result = {key: p.grad for key, p in sae.named_parameters() if p.grad is not None}
            found[way, together] = result | dict(sae.named_buffers()) | dict(loss=ranks.mean(loss))
    if not ranks.number():
        torch.save([[name, together, result] for (name, together), result in found.items()], file)
    ranks.leave()
    return 0


def runs(*commands: str) -> int:
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda *args: None  # one group for all of them
    status = max(experiment.main(json.loads(command)) for command in commands)
    leave()
    return status


def without_pages(*commands: str) -> int:
    small_run.leave_out_pages()
    return runs(*commands)


def fragile(*commands: str) -> int:
    """The same where no eval but the first rank's works."""
    import evals

    load = evals.load
    if int(os.environ["RANK"]):
        evals.load = lambda name: SimpleNamespace(**vars(load(name)) | dict(run=lambda *_: 1 / 0))
    return runs(*commands)


if __name__ == "__main__":
    torch.set_num_threads(1)
    does = {"gradients": gradients, "runs": runs, "without_pages": without_pages, "fragile": fragile}
    ranks.end(does[sys.argv[1]](*sys.argv[2:]))
