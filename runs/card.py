"""The model card of published SAEs: README.md for the Hugging Face hub, of what a run's files say and nothing else.

Texts of a run (names, notes, warnings, errors) stay texts: what Markdown or HTML would read in them is escaped.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass

from runs.comparison import HEADLINES, Compared
from runs.frontier import ALIVE, L0, Interpolated, is_between, l0_of
from runs.outward import no_paths
from runs.reading import Run, setting
from runs.wording import beyond, number, random_line, short, signed

TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "saelens"]
# of a model that the project brings along, see evals/model/built_in.py, which takes a second to import
HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# metrics of the tables, as far as they were measured: what is asked first, and what an L0 and a fit are read from
SHOWN = (*L0, *HEADLINES, "core.explained_variance", "core.kl_div_score", *ALIVE)
# {key of an SAE's config: how it is called in the card}
TRAINED = {"num_tokens": "training tokens", "passes": "passes over them", "steps": "steps", "batch_size": "batch",
           "lr": "learning rate", "context": "context", "dataset": "training text", "core_dataset": "text of core",
           "keep_bos": "BOS positions kept", "max_norm_ratio": "tokens left out above so many median norms",
           "seed": "seed", "dtype": "the model's precision", "profile": "profile", "init_from": "begun from",
           "revisions": "revisions"}
SAELENS, OWN = "SAELens", "this project's own"


@dataclass(frozen=True)
class Published:
    """An SAE that is published: what it is called in its run, and there; its configuration and its judgement."""

    name: str  # of its folder in the run's sae/
    folder: str  # in what is published
    for_saelens: bool
    judged: Compared

    @property
    def run(self) -> Run:
        return self.judged.run


def text(saes: list[Published], info: dict, verdict: dict, doubts: list[str], repo: str, license_id: str) -> str:
    """The card. `info`, `verdict`: run_info.json and verdict.json; `doubts`: why it was asked for despite warnings."""
    parts = [f"# {escaped(title(saes))}", *_doubtful(doubts), *_about(saes, license_id), *_figures(saes),
             *_warnings(saes, verdict), *_trained(saes, info), *_loading(saes, info, repo), *_limits(saes), *_files()]
    return f"---\n{front_matter(saes, license_id)}\n---\n\n" + "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------ for the hub


def front_matter(saes: list[Published], license_id: str) -> str:
    """The YAML that the hub reads, without its `---` lines."""
    from huggingface_hub import EvalResult, ModelCardData

    config = saes[0].run.config
    results = []
    for sae in saes:
        for metric in _measured(sae.run):
            name, of = metric.partition(".")[0], "" if len(saes) == 1 else f" ({sae.folder})"
            texts = config.get("core_dataset") if name == "core" else None
            results.append(EvalResult(
                task_type="feature-extraction", task_name=name, dataset_type=hub_dataset(texts) or name,
                dataset_name=str(texts or name), metric_type=metric, metric_name=f"{metric}{of}",
                metric_value=sae.run.means[metric]))
    data = hub_dataset(config.get("dataset"))
    card = ModelCardData(library_name="saelens", tags=TAGS, base_model=hub_model(config.get("model")),
                         license=license_id or None, datasets=[data] if data else None, model_name=title(saes),
                         eval_results=results or None)
    return card.to_yaml().strip()


def hub_model(name: str | None) -> str | None:
    """A model's name on the hub, or None: a folder, made-up weights and samples of known features have none."""
    name = HUB_NAMES.get(str(name), str(name or ""))
    return name if HUB_NAME.fullmatch(name) else None


def hub_dataset(name: str | None) -> str | None:
    """`owner/name` of owner/name:config:split, or None."""
    found = HUB_NAME.match(str(name or ""))
    return found[0] if found and re.fullmatch(r"(:[\w.-]+)*", str(name)[found.end() :]) else None


# ------------------------------------------------------------------------------------------------ the parts


def title(saes: list[Published]) -> str:
    """`topk SAE of gemma-2-2b, layer 12`."""
    config = saes[0].run.config
    layers = sorted({sae.run.config.get("layer") for sae in saes}, key=str)
    plural = "SAEs" if len(saes) > 1 else "SAE"
    return (f"{config.get('variant')} {plural} of {config.get('model')}, layer{'s' if len(layers) > 1 else ''} "
            f"{', '.join(map(str, layers))}")


def _doubtful(doubts: list[str]) -> list[str]:
    if not doubts:
        return []
    lines = [f"> - {escaped(line)}" for line in doubts]
    return ["\n".join(["> **Published despite warnings: the figures below may show nothing.**", ">", *lines])]


def _about(saes: list[Published], license_id: str) -> list[str]:
    config = saes[0].run.config
    hooks = " and ".join(dict.fromkeys(code(sae.run.config.get("hook_name")) for sae in saes))
    model = hub_model(config.get("model"))
    named = code(model or config.get("model"))
    if config.get("profile") == "tiny" and model is None:
        named += " (random weights, for trying things out)"
    elif model is None:
        named += " (not on the hub)"
    what = "A sparse autoencoder" if len(saes) == 1 else f"{len(saes)} sparse autoencoders"
    rows = [["folder", "variant", "hyper-parameters", "features", "L0", "format"]]
    for sae in saes:
        own = sae.run.config
        form = SAELENS if sae.for_saelens else OWN
        rows.append([code(sae.folder), code(own.get("variant")), code(short(own.get("hyper") or {})),
                     number(own.get("d_sae")), number(l0_of(sae.run)), form])
    licensed = "" if license_id else "\n\nNo license is stated: ask whoever published this before you use it."
    return [f"{what} of the activations at {hooks} of {named}, {own.get('d_in')} dimensions.{licensed}", table(rows)]


def _figures(saes: list[Published]) -> list[str]:
    parts = ["## Figures",
             "± is one standard error, where one can be stated; *yes* where a difference exceeds two of them, *?* "
             "where that is not known. ~ marks a value between two SAEs of a baseline, linear in log L0. *random* is "
             "what a frozen random decoder reaches at that L0, or at the nearest one stored. All that was measured is "
             "in `final_info.json`, SAEBench's own files are in `eval_results/`."]
    for sae in saes:
        one = sae.judged
        if len(saes) > 1:
            parts.append(f"### {code(sae.folder)}")
        baseline = one.partner
        rows = [["metric", "this SAE", "baseline", "difference", "verdict", "> 2 SE", "random"]]
        for metric in _measured(one.run):
            source, judged = one.source(metric), one.judged(metric)
            theirs = source.means.get(metric) if source else None
            random = marked(one.floor.run, metric, number(one.floor.run.means.get(metric))) if one.floor else "–"
            rows.append([code(metric), figure(one.run, metric), _theirs(one, metric),
                         signed(judged.difference, one.run.means[metric], theirs or 0) or "–", judged.verdict or "–",
                         beyond(judged) or "–", random])
        parts.append(table(rows) if len(rows) > 1 else "Nothing was measured.")
        if baseline is None:
            parts.append("No baseline is stored for this model and layer, so nothing says how good these figures are.")
        else:
            parts.append(" ".join(_baseline(one)))
        if one.differs:
            sides = [f"{key} {short(ours)} / {short(theirs)}" for key, (ours, theirs) in one.differs.items()]
            parts.append(f"It differs from that in (this SAE / baseline): {escaped(', '.join(sides))}.")
        for line in [*one.obstacles, *(f"{name} ran with other settings" for name in one.other_settings)]:
            parts.append(f"Not compared: {escaped(line)}.")
        said = [f"**Random line:** {escaped(line)}." for line in random_line(one)]
        if one.floor is None:
            said = ["No frozen random decoder is stored for this model, layer and width: how much of these figures a "
                    "dictionary that learned nothing has as well is not known."]
        parts += said or ["**Random line:** better than a frozen random decoder in every headline metric whose error "
                          "is known."]
    return parts


def _baseline(one: Compared) -> list[str]:
    """Sentences on what the baseline's figures are of."""
    partner = one.partner
    if isinstance(partner, Interpolated):
        a, b = partner.between
        said = [f"The baseline is {escaped(a.config.get('variant'))}. It has no SAE of L0 {number(l0_of(partner))}: "
                f"~values lie between the baseline's SAEs of L0 {number(l0_of(a))} and {number(l0_of(b))}."]
    else:
        at = f"at L0 {number(l0_of(partner))}"
        if one.equal_l0 is False:
            at += ", which is not this SAE's: a sparser SAE reconstructs less, so the differences say little"
        said = [f"The baseline is {escaped(partner.name)}, {at}."]
    elsewhere = [metric for metric in _measured(one.run) if _elsewhere(one, metric)]
    if elsewhere:
        evals = ", ".join(dict.fromkeys(code(metric.partition(".")[0]) for metric in elsewhere))
        said.append(f"In {evals} its SAE of L0 {number(l0_of(one.nearest))} alone was measured, which is another L0: "
                    "those differences say little.")
    return said


def _elsewhere(one: Compared, metric: str) -> bool:
    """Whether a metric's figure of the baseline is of an SAE of another L0 than the other figures."""
    source = one.source(metric)
    return (source is not None and source is not one.at_l0 and one.at_l0 is not None
            and source.means.get(metric) is not None and l0_of(source) != l0_of(one.at_l0))


def _theirs(one: Compared, metric: str) -> str:
    """The baseline's figure, with ~ where it lies between two SAEs, and its L0 where that is another."""
    source = one.source(metric)
    if source is None:
        return "–"
    other = f" (L0 {number(l0_of(source))})" if _elsewhere(one, metric) else ""
    return marked(source, metric, figure(source, metric)) + other


def marked(run: Run, metric: str, text: str) -> str:
    """A figure of a run, with ~ where it lies between those of two SAEs."""
    return f"~{text}" if is_between(run, metric) else text


def _warnings(saes: list[Published], verdict: dict) -> list[str]:
    each = verdict.get("saes") or {}
    ruled = {code(sae.folder): each[sae.name] for sae in saes if sae.name in each} or {"": verdict}
    parts = ["## Verdict, warnings and problems"]
    for of, one in ruled.items():
        said = f"**Verdict**{' on ' if of else ''}{of}: {escaped(one.get('verdict') or 'none was kept')}"
        if verdict.get("metric"):
            said += f", by {code(verdict.get('metric'))}"
        if one.get("why"):
            said += f": {escaped(one['why'])}"
        parts.append(said)
    lines = []
    for sae in saes:
        of = f"{sae.folder}: " if len(saes) > 1 else ""
        told = each.get(sae.name, {} if each else verdict).get("warnings") or []
        lines += [f"{of}{line}" for line in (*told, *sae.judged.warnings, *sae.run.problems)]
    said = "\n".join(f"- {escaped(line)}" for line in dict.fromkeys(lines))
    return [*parts, said or "No warning and no problem was recorded."]


def _trained(saes: list[Published], info: dict) -> list[str]:
    config, settings = saes[0].run.config, info.get("settings") or {}
    rows = [["setting", "value"]]
    for key, called in TRAINED.items():
        value = setting(config, key)
        if value is not None:
            rows.append([called, code(f"{value:,}" if type(value) is int and key != "seed" else short(value))])
    for key, called in (("sweep", "sweep"), ("note", "note"), ("minutes", "limit in minutes")):
        if settings.get(key):
            rows.append([called, code(settings[key])])
    facts = {"commit of the project": info.get("commit"), "device": _device(info.get("hardware") or {}),
             "versions": ", ".join(f"{name} {v}" for name, v in (info.get("versions") or {}).items() if v),
             "seconds": f"{sum(info['seconds'].values()):,.0f}" if info.get("seconds") else None}
    rows += [[called, code(value)] for called, value in facts.items() if value]
    return ["## How it was trained", table(rows)]


def _device(hardware: dict) -> str:
    return hardware.get("gpu") or " ".join(str(hardware[key]) for key in ("device", "machine") if key in hardware)


def _loading(saes: list[Published], info: dict, repo: str) -> list[str]:
    parts = ["## How to load it"]
    for for_saelens in (True, False):
        found = next((sae for sae in saes if sae.for_saelens == for_saelens), None)
        if found is None:
            continue
        if not for_saelens:
            commit = f" (at commit {code(info['commit'])})" if info.get("commit") else ""
            variant = code(found.run.config.get("variant"))
            parts.append(f"SAELens has no architecture that computes what {variant} does. It is read in a checkout of "
                         f"the project that trained it{commit}, which runs its `variant.py`: read that first.")
        parts.append(f"```python\n{loading(found, repo)}```")
    return parts


def loading(sae: Published, repo: str) -> str:
    """Python that fetches an SAE from the hub and encodes with it."""
    config = sae.run.config
    hook = re.sub(r"[^\w.]", "", str(config.get("hook_name")))
    read = f'import torch\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo}", "{sae.folder}")\n'
    if not sae.for_saelens:
        read = ("import torch\nfrom huggingface_hub import snapshot_download\n"
                "from variants.kit.saving import load_sae\n\n"
                f'folder = snapshot_download("{repo}", allow_patterns="{sae.folder}/*")\n'
                f'sae = load_sae(f"{{folder}}/{sae.folder}", trust_code=True)\n')
    return (f"{read}x = torch.randn(8, {config.get('d_in')})  # stands for raw activations at {hook}\n"
            f"features = sae.encode(x)  # [8, {config.get('d_sae')}]\nx_hat = sae.decode(features)\n")


def _limits(saes: list[Published]) -> list[str]:
    config = saes[0].run.config
    lines = ["It takes raw activations: the scale of training is folded into the weights. Activations of another "
             "layer, hook or model mean nothing to it."]
    if not config.get("keep_bos"):
        lines.append("BOS positions were left out of training: its features there mean nothing.")
    if config.get("max_norm_ratio"):
        lines.append("Tokens of unusually large norm were left out of training and of the evals that say so.")
    tokens, context = setting(config, "num_tokens"), setting(config, "context")
    if tokens and context:
        lines.append(f"It was trained on {tokens:,} tokens in rows of {context}, of one text; longer contexts and "
                     "other texts were not looked at.")
    lines += ["One seed: another one gives other features, of which many are not these. ± holds what an eval's "
              "samples leave open, not what another seed would.",
              "That a feature has a name (an explanation, a class of a probe) does not show that the model uses it."]
    return ["## Known limits", "\n".join(f"- {line}" for line in lines)]


def _files() -> list[str]:
    return ["## Files",
            "`final_info.json` and `verdict.json` (of the whole run), `eval_results/` (SAEBench's JSON); `report.html` "
            "and `features/` are pages to download and open, where the run has them."]


# ------------------------------------------------------------------------------------------------ text in Markdown


def _measured(run: Run) -> list[str]:
    known = (metric for metric in SHOWN if run.means.get(metric) is not None)
    return list(dict.fromkeys(metric for metric in known if math.isfinite(run.means[metric])))


def figure(run: Run, metric: str) -> str:
    """A mean with its standard error."""
    error = run.stderrs.get(metric)
    return number(run.means.get(metric)) + (f" ± {error:.2g}" if error is not None else "")


def table(rows: list[list[str]]) -> str:
    """Rows of Markdown, the first of them the header."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def one_line(value) -> str:
    """A text on one line, without paths of a machine and characters that steer what shows it."""
    said = no_paths(" ".join(str(value).split()))
    return "".join(char if char.isprintable() else " " for char in said)


def escaped(value) -> str:
    """A text that Markdown shows as it is, wherever in a line it begins."""
    plain = re.sub(r"([\\`*_{}\[\]#!~$])", r"\\\1", html.escape(one_line(value), quote=False))
    plain = re.sub(r"^(\d+)([.)])", r"\1\\\2", plain)  # no list
    return re.sub(r"^([-+=])", r"\\\1", plain)


def code(value) -> str:
    """A text as code: Markdown reads nothing in it."""
    said = one_line(value)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", said)), default=0))
    space = " " if said.startswith("`") or said.endswith("`") or not said else ""
    return f"{ticks}{space}{said}{space}{ticks}"
