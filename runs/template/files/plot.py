"""Figures of the runs in `labels`, from run_<n>/final_info.json and run_<n>/training_log.csv: python plot.py

training_curves.png  loss, L0 and explained variance by tokens
frontier.png         the headline metric against L0, with standard errors: up and to the left is better
metrics.png          bars of the main metrics, with standard errors
"""

import csv
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The runs to plot, and what each is called in the figures. Only these folders are read.
labels = {
    "run_0": "TopK (baseline)",
}

# Metrics of the bars, by their name in final_info.json; those that no run has are left out.
METRICS = {
    "ground_truth.f1": "F1 (known features)",
    "core.ce_loss_score": "CE loss score",
    "core.explained_variance": "explained variance",
    "core.frac_alive": "features alive",
    "sparse_probing.sae_top_1_test_accuracy": "probing, 1 feature",
    "sae_probes.sae_top_1_test_auc": "sae-probes AUC, 1 feature",
}
HEADLINES = ("ground_truth.f1", "core.ce_loss_score")  # of the frontier: the first that a run has
SPARSITY = ("core.l0", "ground_truth.l0")
HERE = os.path.dirname(os.path.abspath(__file__))


def read(folder):
    """[(label, section of final_info.json, rows of training_log.csv)] of a run, an entry per SAE; [] if it has none."""
    try:
        with open(os.path.join(HERE, folder, "final_info.json"), encoding="utf-8") as file:
            sections = json.load(file)
    except (OSError, ValueError) as error:
        print(f"{folder} is left out: no results ({type(error).__name__})")
        return []
    rows = []
    path = os.path.join(HERE, folder, "training_log.csv")
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    found = []
    for name, section in sections.items():
        label = labels[folder]
        if len(sections) > 1:  # a run of several SAEs
            label = f"{label} {name}"
        found.append((label, section, [row for row in rows if row["sae"] == name]))
    return found


def first_of(section, names):
    """The first of the metrics that a section has a number for, else None."""
    for name in names:
        if section["means"].get(name) is not None:
            return name
    return None


def error_of(section, metric):
    """The standard error of a metric; not a number, which draws no error bar, where none can be stated."""
    error = section.get("stderrs", {}).get(metric)
    return float("nan") if error is None else error


def save(figure, name):
    figure.tight_layout()
    figure.savefig(os.path.join(HERE, name), dpi=150)
    plt.close(figure)
    print(name)


def training_curves(runs, colours):
    columns = {"loss": "training loss", "l0": "L0", "explained_variance": "explained variance"}
    figure, axes = plt.subplots(1, len(columns), figsize=(13, 4))
    for axis, (column, title) in zip(axes, columns.items()):
        for label, _, rows in runs:
            points = [(float(row["tokens"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                axis.plot(*zip(*points), label=label, color=colours[label])
        axis.set_xlabel("tokens")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[2].set_ylim(bottom=max(axes[2].get_ylim()[0], -0.1))  # the first steps lie far below 0
    axes[0].legend(fontsize=8)
    save(figure, "training_curves.png")


def frontier(runs, colours):
    figure, axis = plt.subplots(figsize=(7, 5))
    drawn = None
    for label, section, _ in runs:
        headline, sparsity = first_of(section, HEADLINES), first_of(section, SPARSITY)
        if headline is None or sparsity is None or headline != (drawn or headline):
            print(f"{label} is not in frontier.png: no headline metric, no L0, or another metric than the others")
            continue
        drawn = headline
        means = section["means"]
        axis.errorbar(means[sparsity], means[headline], yerr=error_of(section, headline), fmt="o", capsize=4,
                      label=label, color=colours[label])
    axis.set_xlabel("L0, features per token")
    axis.set_ylabel(METRICS.get(drawn, drawn) or "")
    axis.grid(alpha=0.3)
    if drawn:
        axis.legend(fontsize=8)
    save(figure, "frontier.png")


def metrics(runs, colours):
    shown = [metric for metric in METRICS if any(first_of(section, [metric]) for _, section, _ in runs)]
    figure, axis = plt.subplots(figsize=(max(7, 2 * len(shown)), 5))
    width = 0.8 / len(runs)
    for i, (label, section, _) in enumerate(runs):
        had = [j for j, metric in enumerate(shown) if first_of(section, [metric])]
        places = [j + (i - (len(runs) - 1) / 2) * width for j in had]
        heights = [section["means"][shown[j]] for j in had]
        errors = [error_of(section, shown[j]) for j in had]
        axis.bar(places, heights, width, yerr=errors, capsize=3, label=label, color=colours[label])
    axis.set_xticks(range(len(shown)), [METRICS[metric] for metric in shown], rotation=20, ha="right", fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    save(figure, "metrics.png")


if __name__ == "__main__":
    runs = [entry for folder in labels for entry in read(folder)]
    if runs:
        palette = plt.get_cmap("tab10")
        colours = {label: palette(i % 10) for i, (label, _, _) in enumerate(runs)}
        training_curves(runs, colours)
        frontier(runs, colours)
        metrics(runs, colours)
    else:
        print("nothing to plot: none of the runs in `labels` has results")
