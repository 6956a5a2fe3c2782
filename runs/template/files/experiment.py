"""The sparse autoencoder (SAE) under study, TopK as it stands, trained on a language model's residual stream.

    python experiment.py --out_dir=run_1

hands this file to a runner, which tries the class SAE below (seconds), trains it, evaluates it and compares it with
stored baselines. The loss, with z the k largest of ReLU((x - b_dec) W_enc + b_enc) per token:

    ||x - x_hat||^2 + auxk_alpha * auxk,   x_hat = z W_dec + b_dec;   auxk rebuilds the residual with dead features

What may be changed: everything in the class SAE but its name, the names and arguments of its methods, and the shapes.
  New keyword arguments of __init__ are hyper-parameters, and their defaults are what runs (but for k where features are
  known: there it is the true L0, unless ARGUMENTS has "--hyper=k=16"). Functions and modules of your own belong here.
  ARGUMENTS takes settings of the runner, such as "--seed=1" or "--num_tokens=2000000": runs with other settings than
  run_0's cannot be compared with it, but for the seed.
What must not: the rest of the block below, the evals and the runner's own files. Read no data, write no files and
  print nothing in here; .item(), `if` on a tensor's value and indexing by a mask make a GPU wait in every step.

What comes of it, in run_1/: final_info.json (means, stderrs and settings), training_log.csv, report.html, and
verdict.json, whose content is also the last lines of stdout, a `key: value` each. How the verdict is read:
  better, worse      the metric differs from the baseline's at equal L0 by more than two standard errors
  within_noise       it does not: no evidence either way, however large the difference looks
  equal_to_baseline  equal to the last digit: the change did nothing
  suspect            a warning holds (dead features, no steps, no better than a random decoder): no finding until it
                     is understood; `warnings` names it
  incomparable       no baseline with these settings, or none near this L0
  failed             `why`, `phase`, `advice`, and the last lines of stderr: what, in which line, what to do
By the means alone, where nothing else is shown: hold core.ce_loss_score (where features are known, ground_truth.f1;
higher is better) against a run of about the same core.l0, for fewer features per token always reconstruct worse.
One better run is a hint: the same code with another seed must be better too. A run that fails leaves no results.
"""

if __name__ == "__main__":
    import os
    import sys

    # the folder of the runner and its Python, as they were when this file was made; the variable goes first
    RUNNER = os.environ.get("SAE_RUNNER", "@RUNNER@")
    PYTHON = "@PYTHON@"
    # settings of every run: `python experiment.py --help` lists them
    ARGUMENTS = ["@ARGUMENTS@"]

    started = os.path.join(RUNNER, "experiment.py")
    if not os.path.isfile(started) or not os.path.isdir(os.path.join(RUNNER, "variants")):
        sys.exit(f"no runner in {RUNNER}: set the variable SAE_RUNNER to the folder that holds it")
    if not os.path.isfile(PYTHON):
        PYTHON = sys.executable
    given = [f"--variant={os.path.abspath(__file__)}", *ARGUMENTS]
    # run_0 is the code that all others must differ from; one that trains just like it is refused in the first seconds
    if os.path.isfile("run_0/variant.py") and not any(word.endswith("run_0") for word in sys.argv):
        given.append("--against=run_0/variant.py")
    # in place of this process, so that a time limit ends the run itself; what comes last on the command line counts
    os.execv(PYTHON, [PYTHON, started, *given, *sys.argv[1:]])

# From here on the runner imports this file. Lent by `base`, shapes in brackets (B tokens of a batch, D width of the
# stream, F features, K features kept per token):
#   reconstruction_loss(e [B, D]) -> ||e||^2 summed over D, averaged over B
#   top_k(acts [B, F], k) -> numbers [B, K] of each token's k largest; batch_topk(acts, k) -> mask [B, F], k*B in all
#   kept_activations, decode_sparse: a loss that handles the kept features alone; z [B, F] and self.decode(z) do as well
#   auxk_loss(sae, x, e, acts, dead [F]) -> revives dead features; update_theta: a moving least activation
import torch
from torch.nn import functional as F

from variants import base
from variants.kit.topk import k_now, set_annealing


class SAE(base.SAE):
    """Parameters W_enc [D, F], b_enc [F], W_dec [F, D] (a row is a feature's direction), b_dec [D], from base.SAE.

    More of them: nn.Parameter in __init__; state that is no parameter: register_buffer. Each parameter and each term
    of the loss must have a gradient.
    """

    unit_norm_decoder = True  # rows of W_dec are kept at norm 1, their gradient is projected
    data_parallel = True
    compiled_loss = True  # False where the loss uses Python numbers that change from step to step
    copied_weights = True  # False where the loss changes weights
    grad_clip = 1.0
    saelens = "topk"  # None where encode or decode are no longer TopK's: the architecture the SAE is saved under

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32, k_start=0, k_share=0.8):
        k = base.feature_count("k", k, d_sae)
        super().__init__(d_in, d_sae)
        self.k, self.auxk_alpha = k, auxk_alpha
        set_annealing(self, k_start, k_share)  # k falls from k_start in the first k_share of the run; 0: it does not
        self.default_lr = 2e-4 / (d_sae / 2**14) ** 0.5  # where the settings name none
        self.register_buffer("theta", torch.tensor(-1.0))  # least kept activation, moving average; below 0: none yet

    def initialise(self, x_ND):
        """Before the first step, with N tokens of the stream."""
        self.b_dec.data.copy_(base.geometric_median(x_ND))

    def encode(self, x):
        """Features (..., F) of activations (..., D), where E||x||^2 = 1; any leading dimensions: evals have two."""
        acts = F.relu(self.pre_activations(x))
        top, index = acts.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(acts).scatter(-1, index, top)

    def loss(self, batch, progress):
        """The loss, a scalar, and its terms by name; batch.x [B, D], progress.fraction from 0 to 1.

        note_fired(z [B, F]), or note_fired_indices as here, must see the features: it counts the dead ones.
        """
        k = round(k_now(self, progress))
        acts_BF = base.dense_activations(self, batch.x, k)
        index_BK = base.top_k(acts_BF, k)
        top_BK = base.kept_activations(self, batch.x, acts_BF, index_BK)
        self.note_fired_indices(top_BK, index_BK)
        self._kept = top_BK.detach()
        e_BD = batch.x - base.decode_sparse(top_BK, index_BK, self.W_dec) - self.b_dec
        reconstruction = base.reconstruction_loss(e_BD)
        auxk = base.auxk_loss(self, batch.x, e_BD, acts_BF, self.dead_features(progress))
        return reconstruction + self.auxk_alpha * auxk, {"reconstruction": reconstruction, "auxk": auxk}

    def after_step(self, batch, progress):
        """After the optimiser's step; needs self._kept of the loss above."""
        if k_now(self, progress) == self.k:
            base.update_theta(self.theta, self._kept, progress)
