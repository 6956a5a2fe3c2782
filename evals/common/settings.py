"""What --eval_config may say: every setting is held against the eval's own, before anything is loaded.

The type of the default decides. A whole number is a count, at least 1; any other number is finite and not negative;
a list or an object holds what the default's holds, nothing of it twice. An eval narrows or widens that with literals:

    RANGES      {setting: (least, most)}; bounds that are floats admit fractions
    RECORDED    settings that say for the record what is read, and choose nothing
"""

from __future__ import annotations

import difflib
import json

import evals

COUNT, NUMBER = (1, 10**9), (0.0, 1e9)  # no eval of a thousand million of anything ends
EXAMPLE = """write for example --eval_config '{"core": {"batch_size_prompts": 8}}'"""


def choose(chosen: str, profile: str, overrides: str) -> dict[str, dict]:
    """{eval: its settings} for a comma-separated list, "all" or "none"; `overrides`: JSON, {eval: {setting: value}}."""
    known = evals.names()
    picked = [name.strip() for name in chosen.split(",")]
    if chosen.strip() == "all":
        picked = [name for name in known if profile in evals.declared(name, "CONFIG")]
    picked = [] if picked == ["none"] else picked
    for name in picked:
        if name not in known:
            _refuse_broken(name)
            what = f"--evals={chosen} names no eval in one of its places"
            if name:
                what = f"no eval named {name!r}; the nearest is {_nearest(name, known)!r}"
            raise ValueError(f"{what}\nchoose from: {', '.join(known)}; or all, or none, alone")
        if picked.count(name) > 1:
            raise ValueError(f"--evals names {name} twice\nname each eval once")
    given, configs = parsed(overrides, known), {}
    for name in picked:
        defaults, own = evals.declared(name, "CONFIG"), given.get(name, {})
        ranges, recorded = evals.declared(name, "RANGES") or {}, evals.declared(name, "RECORDED") or ()
        if profile not in defaults:
            raise ValueError(_not_there(name, profile, defaults))
        check(name, own, profile, defaults, ranges, recorded)
        configs[name] = defaults[profile] | own
    return configs


def _not_there(name: str, profile: str, defaults: dict) -> str:
    """Why an eval has no settings for a profile, and what to do."""
    if profile == "synthetic":
        return (f"the eval {name} needs a language model, and the profile synthetic has none\n"
                f"leave {name} out of --evals")
    if list(defaults) == ["synthetic"]:
        return (f"the eval {name} needs known features, which the profile {profile} has not\n"
                f"leave {name} out of --evals, or take --profile synthetic")
    return (f"{evals.place(name, 'CONFIG')}: CONFIG has no profile {profile!r}\n"
            f"add it, or leave {name} out of --evals")


def parsed(text: str, known: list[str]) -> dict[str, dict]:
    """{eval: {setting: value}} of the JSON text; ValueError for another shape, or an eval that there is not."""
    try:
        given = json.loads(text or "{}", object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        what, _, advice = str(error).partition("\n")
        raise ValueError(what + "\n" + advice if advice else f"--eval_config is not JSON: {error}\n{EXAMPLE}") from None
    if not isinstance(given, dict):
        raise ValueError(f"--eval_config is {shown(given)}, not an object of evals\n{EXAMPLE}")
    for name, settings in given.items():
        if name not in known:
            _refuse_broken(name)
            raise ValueError(f"--eval_config: no eval named {name!r}; the nearest is {_nearest(name, known)!r}\n"
                             f"choose from: {', '.join(known)}")
        if not isinstance(settings, dict):
            raise ValueError(f"--eval_config: {name} is {shown(settings)}, not an object of settings\n{EXAMPLE}")
    return given


def _refuse_broken(name: str) -> None:
    """ValueError, with file and line, if there is a file of that name that is no eval as it stands."""
    problem = evals.problem(name)
    if problem:
        raise ValueError(problem)


def _nearest(name: str, known) -> str:
    return difflib.get_close_matches(name, known, 1, 0)[0]


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError where a name stands twice, of which JSON would keep the last in silence."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--eval_config: {twice[0]!r} is given twice\nkeep one of the two")
    return dict(pairs)


def check(name: str, given: dict, profile: str, defaults: dict[str, dict], ranges: dict, recorded: tuple) -> None:
    """ValueError for a setting that an eval does not have, or a value that it cannot take. `defaults`: its CONFIG."""
    own = defaults[profile]
    for key, value in given.items():
        if key not in own:
            raise ValueError(f"--eval_config: {name} has no setting {key!r}; the nearest is {_nearest(key, own)!r}\n"
                             f"its settings: {', '.join(own)}")
        given_as = f"--eval_config: {name}: {key} = {shown(value)}"
        if key in recorded and value != own[key]:
            raise ValueError(f"{given_as} would change nothing: it reads held-out texts\ngive --core_dataset")
        wanted = lacking(value, [config[key] for config in defaults.values() if key in config], ranges.get(key))
        if wanted:
            raise ValueError(f"{given_as} is not {wanted}\nits default is {shown(own[key])}")


def lacking(value, examples: list, bounds: tuple | None = None) -> str:
    """What a value would have to be to stand for the examples (the defaults of all profiles); "" if it is that."""
    kinds = {type(example) for example in examples}
    inside = [item for example in examples if isinstance(example, (list, dict)) for item in _items(example)]
    if value is None and type(None) in kinds:
        return ""
    if bool in kinds:
        return "" if isinstance(value, bool) else "true or false"
    if str in kinds:
        return "" if isinstance(value, str) and value.strip() else "a name"
    if dict in kinds:
        return _lacking_inside(value, dict, "an object", all(examples), inside, bounds)
    if list in kinds:
        return _lacking_inside(value, list, "a list", all(examples), inside, bounds)
    fractions = float in kinds or isinstance((bounds or COUNT)[0], float)
    least, most = bounds or (NUMBER if fractions else COUNT)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and (fractions or isinstance(value, int))
    if number and least <= value <= most:  # NaN is not
        return ""
    kind = "number" if fractions else "whole number"
    wanted = f"a {kind} from {least:,} to {most:,}"
    return f"{wanted}, or null" if type(None) in kinds else wanted


def _lacking_inside(value, kind: type, called: str, filled: bool, inside: list, bounds: tuple | None) -> str:
    """The same for a list or an object, not empty if `filled`, with entries like those `inside` the examples."""
    if not isinstance(value, kind):
        return called
    if filled and not value:
        return f"{called} with anything in it"
    items = _items(value)
    if any(items.count(item) > 1 for item in items) and kind is list:
        return f"{called} without repetitions"
    wanted = next(filter(None, (lacking(item, inside, bounds) for item in items)), "")
    return f"{called} of which each is {wanted}" if wanted else ""


def _items(value: list | dict) -> list:
    return list(value.values()) if isinstance(value, dict) else value


def shown(value) -> str:
    """A value as JSON writes it, without its end where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def check_requirements(chosen: dict[str, dict], overrides: str, facts: dict) -> list[str]:
    """Notes on settings that change nothing and on files that are left out.

    ValueError for an eval that cannot run with its settings here.

    `facts`: what is known before a weight is read (see evals/__init__.py).
    """
    for name, config in chosen.items():
        problems = evals.load(name).requirements(config, facts)
        if problems:
            what, _, advice = problems[0].partition("\n")
            others = ",".join(other for other in chosen if other != name) or "none"
            raise ValueError(f"the eval {name} cannot run: {what.removeprefix(f'{name}: ')}\n"
                             + (advice or f"leave it out: --evals {others}"))
    unused = json.loads(overrides or "{}").keys() - chosen.keys()
    notes = [f"--eval_config: {name} is not among --evals: its settings change nothing" for name in unused]
    left_out = [wrong.partition("\n")[0] for wrong in evals.broken().values()]
    if left_out:
        notes.append(f"not among the evals: {'; '.join(left_out)}")
    return notes
