"""The command line and what a setting may be: a mistake is said in one line, before anything is read."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from runs.live import LOGGERS

# {setting: (least, most)}. The upper ends are far beyond any run there has been; what fits, the forecast says.
RANGES = {
    "context": (2, 2**24),
    "num_tokens": (0, 10**13),
    "passes": (1, 10**5),
    "block_tokens": (1, 10**10),
    "d_sae": (1, 2**26),
    "batch_size": (1, 2**26),
    "lr": (1e-12, 100.0),
    "max_norm_ratio": (1.01, 1e9),  # below 1 half of the tokens would go
    "lm_batch_size": (1, 2**20),
    "seed": (0, 2**32 - 1),  # what NumPy's and scikit-learn's generators take
    "log_lines": (1, 10**6),
    "snapshots": (0, 10**4),
    "minutes": (0.0, 1e6),
    "checkpoint_seconds": (0.0, math.inf),  # inf: at the end alone
    "activation_cache_gb": (0.0, 1e9),
}
MOST_BLOCKS = 10**6  # each is planned ahead


def check_numbers(values: dict[str, object]) -> None:
    """ValueError for the first setting, of those that are set, that lies outside its range. NaN lies outside each."""
    for name, (least, most) in RANGES.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and not least <= value <= most:
            wrong = f"is above {most:,}\ngive a smaller number"
            if math.isnan(value):
                wrong = "is no number\ngive one, or leave it out"
            elif value < least:
                wrong = f"is below {least:,}\ngive a larger number"
            raise ValueError(f"--{name}={value} {wrong}")


def check_sizes(settings) -> None:
    """ValueError where the numbers of a run, each in its range, leave nothing to train, or more than can be planned."""
    store_gb(settings.activation_cache_gb)
    tokens, block, batch = settings.num_tokens, settings.block_tokens, settings.batch_size
    if tokens == 0 and not settings.init_from:
        raise ValueError("--num_tokens=0 is below 1\ngive a larger number, or name an SAE to evaluate: --init_from")
    if tokens == 0 and settings.max_norm_ratio:
        raise ValueError(f"--max_norm_ratio={settings.max_norm_ratio:g} is measured on what is trained on, and "
                         "--num_tokens=0 trains on nothing\nleave --max_norm_ratio out")
    if tokens > MOST_BLOCKS * block:
        raise ValueError(f"--num_tokens={tokens} in blocks of --block_tokens={block} are more than {MOST_BLOCKS:,} "
                         "blocks\ngive larger blocks, or fewer tokens")
    if min(tokens or batch, block) < batch:
        raise ValueError(f"--num_tokens={tokens} and --block_tokens={block} must each hold at least one batch of "
                         f"{batch} tokens: the run would train 0 steps\ngive more tokens, or a smaller --batch_size")


def of_preset(preset: str, profile: str) -> str:
    """The profile of a preset where there is none but "auto", else that given; ValueError where the two do not go
    together.
    """
    wanted = {"synth16k": "synthetic"}.get(preset, profile)
    if profile not in ("auto", wanted) or (preset == "saebench" and profile == "synthetic"):
        raise ValueError(f"--preset={preset} is none of the profile {profile}\nleave one of them out")
    return wanted


def rows_per_pass(text: str) -> int | str:
    """What --lm_batch_size says: a whole number above 0, or "auto"."""
    if text != "auto" and not re.fullmatch(r"0*[1-9][0-9]{0,18}", text):
        raise ValueError(f"--lm_batch_size={text[:40]} is no number of rows\ngive a whole number above 0, or auto")
    return text if text == "auto" else int(text)


def store_gb(text: str) -> float | None:
    """What --activation_cache_gb says: a number of GB, or None for "auto"."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"--activation_cache_gb={text[:40]} is no number of GB\ngive one, or auto") from None
    check_numbers({"activation_cache_gb": value})
    return value


def loggers(text: str) -> list[str]:
    """The names that --log gives; ValueError for one that is none."""
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    for name in names:
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, 1, 0)[0]
            raise ValueError(f"--log={text[:80]}: there is no {name!r}; the nearest is {near!r}\n"
                             f"give {' or '.join(LOGGERS)}, or both with a comma between")
    return list(dict.fromkeys(names))


def block_numbers(text: str) -> list[int]:
    """The blocks that --layers names, in order. ValueError for what is no list of whole numbers, or names one twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise ValueError(
            f"--layers={text} is not a list of block numbers\nwrite for example --layers 5,12,19; the first block is 0"
        )
    numbers = sorted(map(int, parts))
    twice = [a for a, b in zip(numbers, numbers[1:]) if a == b]
    if twice:
        raise ValueError(f"--layers={text} names {twice[0]} twice\nname each block once")
    return numbers


# ------------------------------------------------------------------------------------------------ the command line


def parse(argv: list[str], kind: type, description: str, never_empty: set[str]) -> tuple[object, list[str]]:
    """Settings of the dataclass `kind` from a command line, and notes on it.

    ValueError in one line for an unknown flag, which names the nearest valid one, or for a value that is none.
    """
    from simple_parsing import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str):
            raise ValueError(f"{message}\nsee python experiment.py --help")

    flags = {field.name: field.type in (bool, "bool") for field in dataclasses.fields(kind)}
    parser = Parser(description=description, add_option_string_dash_variants=False, allow_abbrev=False)
    parser.add_arguments(kind, dest="settings")
    notes = check_arguments(argv, flags, never_empty)
    parsed, strange = parser.parse_known_args(argv)
    if strange:
        place = argv.index(strange[0]) if strange[0] in argv else 0
        raise unknown(strange[0], argv[place - 1] if place else None, list(flags))
    loggers(parsed.settings.log)
    return parsed.settings, notes


def check_arguments(argv: list[str], flags: dict[str, bool], never_empty: set[str]) -> list[str]:
    """Notes on a command line; ValueError for a flag without its value. `flags`: {name: whether it is a switch}.

    A flag may be given again, as scripts that add to a command do: its last value counts, and that is noted.
    """
    given: dict[str, list[str]] = {}
    for token, following in zip(argv, [*argv[1:], None]):
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name not in flags or flags[name]:
            continue
        if not equals and (following is None or following.startswith("--")):
            raise ValueError(f"--{name} is given without a value\nwrite --{name}=…")
        value = value if equals else following
        if not value.strip() and name in never_empty:
            raise ValueError(
                f"--{name} is given an empty value (a variable of the shell that is not set?)\n"
                f"give one, or leave --{name} out"
            )
        if "\0" in value:
            raise ValueError(f"--{name} holds a NUL character\ngive it without")
        given.setdefault(name, []).append(value)
    return [
        f"--{name} is given {len(values)} times: the last, {values[-1]}, counts"
        for name, values in given.items()
        if len(set(values)) > 1
    ]


def unknown(argument: str, before: str | None, flags: list[str]) -> ValueError:
    """The error about an argument that is no flag, `before` being the one in front of it on the command line."""
    if re.match(r"[-–—]", argument) and argument != "--" or argument.partition("=")[0] in flags:
        flag = argument.partition("=")[0]
        near = difflib.get_close_matches(re.sub("^[-–—]+", "--", flag), [f"--{name}" for name in flags], 1, 0)[0]
        return ValueError(
            f"unknown argument {flag}; the nearest is {near}\nvalid flags: {' '.join(f'--{name}' for name in flags)}"
        )
    after = f" after {before!r}" if before else ""
    return ValueError(
        f"{argument!r}{after} belongs to no flag\n"
        'write --name=value without spaces around =; quote a value with spaces: --hyper="k=4, auxk_alpha=0"'
    )
