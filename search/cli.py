"""The command line: ``lacer search | compare | train | evaluate | watch | export | show | prompt | envs | ...``."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console

from lacer.envs import LacerError, did_you_mean, list_envs
from lacer.search.config import (
    COMMON,
    LARGEST_SEED,
    NESTED,
    BenchConfig,
    SearchConfig,
    TableConfig,
    merge,
    resumed,
    validate,
    validate_as,
)
from lacer.search.presets import presets, read_yaml

EXAMPLES = {
    "search": """examples:
  lacer search --config quick
  lacer search --env lacer/MixedTraffic-v0 --designer evolution --candidates 20
  lacer search --env lacer/MixedTraffic-v0 --designer lacer --llm openai:MODEL --llm-base-url URL --candidates 50
  lacer search --config my.yaml --protocol.steps 20000 --seed 1
  lacer search --config full --dry-run        # what it would take: steps, hours, tokens
  lacer search --config quick --json          # for scripts: one JSON object on standard output
  lacer search --resume runs/20260101-120000-MixedTraffic-v0-evolution""",
    "compare": """examples:
  lacer compare quick
  lacer compare quick --designers random,darts --base.max-env-steps 40000 --seeds 0,1,2,3,4,5
  lacer compare configs/comparisons/llm.yaml --base.llm openai:MODEL --dry-run
  lacer compare --resume comparisons/20260101-120000-quick
  lacer compare runs/random-1 runs/random-2 runs/evolution-1 runs/evolution-2
  lacer compare old=runs/before-* new=runs/after-* --allow version""",
    "watch": """examples:
  lacer watch runs/R
  lacer watch comparisons/C
  lacer watch postgresql+psycopg://user@host/database --study-name R""",
    "export": """examples:
  lacer export runs/R --out trials.csv
  lacer export runs/R --out trials.parquet
  lacer export comparisons/C --curves --out curves.csv.gz
  lacer export runs/R | head""",
    "train": """examples:
  lacer train --encoder runs/R/best/encoder.json --env lacer/MixedTraffic-v0 --steps 200000
  lacer train --encoder my_encoder.json --config quick --steps 50000 --out agents/mine""",
    "evaluate": """examples:
  lacer evaluate runs/R/best --episodes 20
  lacer evaluate runs/R/best --episodes 50 --seed 7 --json
  lacer evaluate runs/R/best --episodes 1 --video traffic.mp4""",
    "show": """examples:
  lacer show runs/R/best
  lacer show my_encoder.json --env lacer/KnownSources-v0 --out picture.svg""",
    "bench": """examples:
  lacer bench --table benchmarks/data/nasbench_macro.csv.gz --arch arch --score mean_acc \\
              --designers random,evolution,optuna:TPESampler --budget 200 --seeds 200 --out bench/macro
  lacer bench --table benchmarks/data/composite_bench.parquet --arch ncode --score objective --repeated
  lacer bench --function mymodule:score --space mymodule:space --designers random,bo --budget 30
  lacer bench make --config composite""",
    "bench make": """examples:
  lacer bench make --config composite
  lacer bench make --env lacer/KnownSources-v0 --encoders 100 --seeds 3 --protocol.steps 4000
  lacer bench make --resume bench/20260101-120000-KnownSources-v0""",
    "ranker train": """examples:
  lacer ranker train --out ranker
  lacer ranker train --out ranker --resume
  lacer ranker train --out small --steps 600 --width 32 --layers 2 --seed 1
  tensorboard --logdir ranker
  lacer bench --table benchmarks/data/nasbench_macro.csv.gz --score mean_acc --designers random,bo,ranker
  lacer search --designer ranker --designer-kwargs '{"weights": "ranker/weights.safetensors"}'""",
    "prompt": """examples:
  lacer prompt runs/R 7
  lacer prompt runs/R 7 | less""",
    "sync": """examples:
  lacer sync runs/R
  lacer sync comparisons/C
  WANDB_BASE_URL=https://wandb.example.org lacer sync runs/R""",
    "envs": """examples:
  lacer envs
  lacer envs CartPole-v1
  lacer envs HalfCheetah-v5 --env-kwargs '{"describe": {"camera": 64}}'""",
    "blocks": """examples:
  lacer blocks
  lacer blocks gru
  lacer blocks set:attention""",
}


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _get_help_string(self, action: Any) -> str:
        return action.help or ""  # the texts name their defaults; jsonargparse would add "type, default: null"


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line on standard error and exit code 2; unknown options get "did you mean"."""
        message = message.strip()
        known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
        unknown = [w for w in message.split() if w.startswith("--") and w.split("=")[0] not in known]
        wrong = re.match(r'Parser key "(.+?)":', message)
        if wrong is not None:  # jsonargparse tells of Python's types, on ten lines
            message = self._wrong_value(wrong[1], message)
        elif unknown and "nrecognized" in message:
            message += did_you_mean(unknown[0].split("=")[0], known).rstrip(".")
        elif message.startswith("ambiguous option"):
            message = re.sub(r"((?:[^,]+,){3}).*", r"\1 ...", message)
        command = self.prog.replace(" COMMAND", "").replace(" [options]", "").replace("bench-make", "bench make")
        required = re.findall(r"([\w-]+)\.(\w+)", message) if "are required: " in message else []
        if required:  # arguments of the command, told by the parser above it
            name = required[0][0]
            below: Any = next(a for a in self._actions if name in (a.choices or ()))
            missing = [a for a in below.choices[name]._actions if a.dest in [key for _, key in required]]
            message = f"{name} needs {' and '.join((a.option_strings or [a.metavar])[0] for a in missing)}"
            command = f"{command} {name}"
        fail(f"{message}\nSee `{command} --help`.")

    def _wrong_value(self, key: str, message: str) -> str:
        """In words, what an option's value has to be."""
        action = next((a for a in self._actions if a.dest == key), None)
        kind: Any = getattr(action, "_typehint", None) or getattr(action, "type", None)
        kind = next((k for k in get_args(kind) if k is not type(None)), kind) if type(None) in get_args(kind) else kind
        inner = next((k for k in get_args(kind) if get_origin(k) is Literal), kind)
        given = re.search(r"(?:Given value:|Got value:) (.*)$", message)
        what = (f"one of {', '.join(map(str, get_args(inner)))}" if get_origin(inner) is Literal else
                {int: "a whole number", float: "a finite number", str: "text"}.get(
                    kind, "JSON, such as '{\"name\": 1}'" if "dict" in str(kind) else "a list, such as '[1, 2]'"))
        if inner is not kind:
            what = f"a list of {what.removeprefix('one of ')}"
        name = action.option_strings[0] if action is not None and action.option_strings else key
        return f"{name} must be {what}" + (f", not {given[1][:60]!r}" if given is not None else "")


def fail(message: str) -> NoReturn:
    """Prints an error and exits with 2."""
    print(f"lacer: error: {message}", file=sys.stderr)
    sys.exit(2)


def _add_fields(parser: ArgumentParser, model: type[BaseModel], prefix: str = "", only: set[str] | None = None) -> None:
    """One option per field, nested models as ``--protocol.steps``; without a value it is left to config or default."""
    # What a model inherits comes after its own.
    for name, f in sorted(model.model_fields.items(), key=lambda x: x[0] not in model.__annotations__):
        if only is not None and name not in only:
            continue
        kind: Any = f.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            _add_fields(parser, kind, f"{prefix}{name}.")
            continue
        if kind is bool:
            parser.add_argument("--" + f"{prefix}{name}".replace("_", "-"), dest=f"{prefix}{name}", default=None,
                                action=ActionYesNo(no_prefix="no-"), help=f.description or "")
            continue
        default = f.get_default()
        shown = "" if default is PydanticUndefined or default in (None, {}) else f" (default: {default})"
        parser.add_argument("--" + f"{prefix}{name}".replace("_", "-"), dest=f"{prefix}{name}", type=kind | None,
                            default=None, metavar=_metavar(kind), help=(f.description or "") + shown)


def _metavar(kind: Any) -> str:
    kind = next((k for k in get_args(kind) if k is not type(None)), kind) if type(None) in get_args(kind) else kind
    if kind in (int, float, str):
        return {int: "N", float: "X", str: "NAME"}[kind]
    return "JSON" if "dict" in str(kind) or "tuple" in str(kind) or "list" in str(kind) else "VALUE"


def _given(args: Namespace, skip: tuple[str, ...]) -> dict[str, Any]:
    """Options that were given, nested as in the model."""
    def prune(data: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for k, v in data.items():
            v = prune(v) if isinstance(v, dict) and k in NESTED else v
            if v is not None and v != {}:
                out[k] = v
        return out

    return prune({k: v for k, v in args.as_dict().items() if k not in skip})


def _add_dry_run(p: _Parser) -> None:
    p.add_argument("--dry-run", dest="dry_run", action="store_true", help="check everything, train for 1,000 steps to "
                   "measure the speed, and print the plan: candidates, steps, hours, tokens")
    p.add_argument("--measured-steps", dest="measured_steps", type=int, default=1000, metavar="N", help="steps that "
                   "--dry-run measures; 0: none, and no hours (default: 1000)")


def _parser() -> _Parser:
    parser = _Parser(prog="lacer", usage="lacer COMMAND [options]", formatter_class=_HelpFormatter,
                     description="Search for the state encoder of a multi-source RL agent.")
    commands = parser.add_subcommands(required=True, dest="command")

    def command(name: str, text: str, shown: str = "") -> _Parser:
        shown = shown or name
        p = _Parser(prog=f"lacer {shown}", usage=f"lacer {shown} [options]", description=text,
                    epilog=EXAMPLES.get(shown), formatter_class=_HelpFormatter)
        commands.add_subcommand(name, p, help=text)
        return p

    p = command("search", "search an encoder, train the winner, write a report")
    p.add_argument("--config", default=None, metavar="FILE", help="YAML file, or preset (quick, full, cluster); "
                   "options win")
    p.add_argument("--resume", default=None, metavar="RUN", help="go on with a run folder")
    p.add_argument("--out", default=None, metavar="FOLDER", help="run folder (default: runs/<date-time-env-designer>)")
    p.add_argument("--quiet", action="store_true", help="print nothing but the result")
    p.add_argument("--json", action="store_true", help="print the result as one JSON object; progress goes to "
                   "standard error")
    _add_dry_run(p)
    _add_fields(p, SearchConfig)

    p = command("compare", "compare designers over seeds and environments, or finished runs")
    p.add_argument("what", nargs="*", metavar="FILE|RUN", help="one YAML file or preset (quick, paper, llm) to run; or "
                   "finished run folders, comparisons' folders, and LABEL=FOLDER or LABEL='PATTERN' for groups")
    p.add_argument("--resume", default=None, metavar="FOLDER", help="go on with a comparison")
    p.add_argument("--out", default=None, metavar="FOLDER", help="folder to write (default: "
                   "comparisons/<date-time-name>)")
    p.add_argument("--quiet", action="store_true", help="print nothing but the result")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    p.add_argument("--seeds", default=None, metavar="N,N", help="seeds in place of the file's")
    p.add_argument("--designers", default=None, metavar="A,B", help="labels of the file, or designers, to compare")
    p.add_argument("--envs", default=None, metavar="A,B", help="labels of the file's environments, or environment ids")
    p.add_argument("--levels", default=None, metavar="X,Y", help="scores that designers are to reach (default: the "
                   "expert's, and the best tenth and hundredth of all candidates)")
    p.add_argument("--allow", default=None, metavar="WORD,WORD", help="with runs: what may differ between them: env, "
                   "protocol, budget, space, version")
    _add_dry_run(p)
    _add_fields(p, SearchConfig, "base.")

    p = command("watch", "follow a search or a comparison that another process runs, until it ends")
    p.add_argument("run", metavar="RUN|URL", help="run folder, comparison's folder, or storage URL")
    p.add_argument("--study-name", dest="study_name", default=None, metavar="NAME", help="with a URL: the study, if "
                   "there are several")
    p.add_argument("--interval", type=float, default=1.0, metavar="X", help="seconds between two looks (default: 1)")

    p = command("export", "write all trials of a run or a comparison as CSV or Parquet")
    p.add_argument("run", metavar="RUN", help="run folder, or comparison's folder")
    p.add_argument("--out", default=None, metavar="FILE", help=".csv, .csv.gz or .parquet (default: CSV on standard "
                   "output)")
    p.add_argument("--curves", action="store_true", help="the learning curves in place of the trials")

    p = command("train", "train one encoder with PPO and save the agent")
    p.add_argument("--encoder", required=True, metavar="FILE", help="encoder.json, or an agent folder")
    p.add_argument("--config", default=None, metavar="FILE", help="YAML file or preset with env and protocol")
    p.add_argument("--env", default=None, metavar="ID", help="environment id")
    p.add_argument("--env-kwargs", dest="env_kwargs", type=dict | None, default=None, metavar="JSON",
                   help="constructor arguments of the environment")
    p.add_argument("--steps", type=int, default=200_000, metavar="N", help="environment steps (default: 200000)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="training seed (default: 0)")
    p.add_argument("--episodes", type=int, default=20, metavar="N", help="evaluation episodes (default: 20)")
    p.add_argument("--out", default=None, metavar="FOLDER", help="agent folder (default: agents/<date-time-env>)")

    p = command("evaluate", "evaluate a saved agent on held-out seeds")
    p.add_argument("agent", metavar="FOLDER", help="agent folder, e.g. runs/.../best")
    p.add_argument("--episodes", type=int, default=20, metavar="N", help="episodes (default: 20)")
    p.add_argument("--seed", type=int, default=2_000_000, metavar="N", help="seed of the first episode; the others "
                   "follow (default: 2000000, which no search uses)")
    p.add_argument("--env-kwargs", dest="env_kwargs", type=dict | None, default=None, metavar="JSON",
                   help="environment arguments that differ from the training")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--video", default=None, metavar="FILE", help="also record the first episode, with the texts that "
                   "the agent reads and what its actions depend on, as .mp4 (needs lacer[video]) or .gif")

    p = command("show", "show an encoder: its modules with shapes, parameters and FLOPs, and a picture")
    p.add_argument("encoder", metavar="FILE", help="encoder.json, or an agent folder")
    p.add_argument("--env", default=None, metavar="ID", help="environment id (default: the agent's)")
    p.add_argument("--env-kwargs", dest="env_kwargs", type=dict | None, default=None, metavar="JSON",
                   help="constructor arguments of the environment")
    p.add_argument("--depth", type=int, default=1, metavar="N", help="levels of torch modules shown below a block "
                   "(default: 1)")
    p.add_argument("--out", default=None, metavar="PICTURE", help="picture to write, .svg or .png")

    p = command("prompt", "show what the language model saw and said for a trial of a search")
    p.add_argument("run", metavar="RUN", help="run folder, e.g. runs/R")
    p.add_argument("number", type=int, metavar="N", help="number of the trial, as in #N")

    p = command("sync", "upload what a search or a comparison logged offline to Weights & Biases")
    p.add_argument("run", metavar="RUN", help="folder of a run or of a comparison, e.g. runs/R")

    p = command("envs", "list environments, or show one: its sources, actions and objective")
    p.add_argument("env", nargs="?", default=None, metavar="ID", help="environment id; any that Gymnasium knows")
    p.add_argument("--env-kwargs", dest="env_kwargs", type=dict | None, default=None, metavar="JSON",
                   help="constructor arguments of the environment")
    p = command("blocks", "list the blocks that encoders are made of, or explain one")
    p.add_argument("name", nargs="?", default=None, metavar="NAME", help="a block, e.g. gru or series:gru")
    command("designers", "list designers")

    p = command("bench", "run designers over a table of measured architectures; `lacer bench make` measures one")
    p.add_argument("--out", default=None, metavar="FOLDER", help="folder to write; one that holds a part of the same "
                   "comparison is gone on with (default: bench/<date-time-table>)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_fields(p, BenchConfig)
    made = command("bench-make", "train and evaluate many encoders and write one table", "bench make")
    made.add_argument("--config", default=None, metavar="FILE", help="YAML file, or preset: composite")
    made.add_argument("--out", default=None, metavar="FOLDER", help="run folder (default: bench/<date-time-env>)")
    made.add_argument("--resume", default=None, metavar="FOLDER", help="go on with a folder")
    made.add_argument("--quiet", action="store_true", help="print nothing but the result")
    _add_fields(made, TableConfig, only=COMMON | {"encoders", "seeds"})

    ranker = command("ranker", "train the network of the designer `ranker`: `lacer ranker train`")
    _add_ranker_train(ranker)
    return parser


def _add_ranker_train(parser: _Parser) -> None:
    from lacer.search.ranker.settings import Training

    p = _Parser(prog="lacer ranker train", usage="lacer ranker train [options]", formatter_class=_HelpFormatter,
                description="Train the network of the designer `ranker` on synthetic tasks, on one core. Without "
                "options the shipped weights are made again (bit by bit on the same machine and versions).",
                epilog=EXAMPLES["ranker train"])
    p.add_argument("--out", default="ranker", metavar="FOLDER", help="checkpoint, TensorBoard events and "
                   "weights.safetensors (default: ranker)")
    p.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    p.add_argument("--every", type=int, default=400, metavar="N", help="updates between two checkpoints (default: 400)")
    for name, default, text in (
            ("steps", Training.steps, "updates"), ("seed", Training.seed, "seed of weights, tasks and histories"),
            ("width", Training.width, "of an encoder's token"), ("layers", Training.layers, "of the Transformer"),
            ("longest", Training.longest, "longest history")):
        p.add_argument(f"--{name}", type=int, default=None, metavar="N", help=f"{text} (default: {default})")
    p.add_argument("--without", default=None, metavar="FAMILY,…", help="families of functions that no task is made of, "
                   "to see what each is good for (default: none)")
    p.add_argument("--no-prune", action="store_true", help="whole spaces only (default: a quarter is pruned)")
    parser.add_subcommands(required=True, dest="what").add_subcommand("train", p, help="train it on synthetic tasks")


def parse(argv: list[str]) -> Namespace:
    """The arguments of a command line. Exits with 2 if they are wrong."""
    if argv[:2] == ["bench", "make"]:  # `bench` itself has options, so `make` cannot be a command below it
        argv = ["bench-make", *argv[2:]]
    return _parser().parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``lacer`` command."""
    logging.basicConfig(level=logging.WARNING, format="lacer: %(message)s")
    warnings.filterwarnings("ignore", module="optuna")
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if os.getcwd() not in sys.path:  # for module:Id in the working folder; last, so that it shadows nothing
            sys.path.append(os.getcwd())
        {"search": _search, "compare": _compare, "train": _train, "evaluate": _evaluate, "watch": _watch,
         "export": _export, "sync": _sync, "show": _show, "prompt": _prompt, "envs": _envs, "blocks": _blocks,
         "designers": _designers, "bench": _bench, "bench-make": _bench_make,
         "ranker": _ranker}[args.command](args[args.command])
        print(end="", flush=True)  # not sys.stdout.flush(): there may be none
    except LacerError as e:
        fail(str(e))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit goes nowhere
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:  # a path that cannot be used, a disk that is full; anything else is a mistake of ours
        if e.filename is None and e.errno != errno.ENOSPC:
            raise
        fail(f"{e.strerror}: {str(e.filename)[:200]}" if e.filename is not None else str(e.strerror))
    except KeyboardInterrupt:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(130)  # at once: an LLM's reply or a tracker may still be awaited in a thread


def _search(a: Namespace) -> None:
    given = _given(a, ("config", "resume", "out", "quiet", "json", "dry_run", "measured_steps"))
    if a.resume is not None:
        if a.config is not None:
            raise LacerError("--config and --resume exclude each other: a run keeps its own configuration")
        if a.dry_run:
            raise LacerError("--dry-run and --resume exclude each other")
        from lacer.search.loop import search

        result = search(resume=a.resume, out=a.out, quiet=a.quiet, **given)
    else:
        base = read_yaml(a.config) if a.config is not None else {}
        if a.config is not None:
            validate(base, a.config)  # names the file if a key of it is wrong
        merged = merge(base, given)
        config = validate(merged, "--")  # what is wrong now was given as an option
        from lacer.search.loop import make_designer, plan, search

        if a.dry_run:
            made = plan(config)
            make_designer(made.designer, config, Path(".")).check_space(made.space)
            return _dry_run([(made.designer, made)], a)
        result = search(out=a.out, quiet=a.quiet, **merged)
    from lacer.search.loop import summary
    from lacer.search.progress import candidate_table

    if a.json:
        print(json.dumps(result.outcome.figures() | {"folder": str(result.folder), "report": str(result.report)}))
    else:
        console = Console(highlight=False)
        console.print()
        # Wide enough for all sources also where the output is a file; a terminal keeps its own width.
        wide = console if console.is_terminal else Console(width=160, highlight=False)
        wide.print(candidate_table(result.outcome))
        print("\n" + summary(result))
    if result.outcome.winner is None:
        sys.exit(1)


def _dry_run(plans: list[tuple[str, Any]], a: Namespace) -> None:
    """Prints what some searches would take; the speed is measured once for each environment."""
    from lacer.search.estimate import Speed, describe, figures, measure
    from lacer.search.loop import check_expert

    if a.measured_steps < 0:
        raise LacerError(f"--measured-steps must be at least 0, not {a.measured_steps}")
    known: dict[str, Speed | None] = {}
    speeds = []
    for _, plan in plans:
        c = plan.config
        check_expert(plan)
        key = json.dumps([c.env, c.env_kwargs, c.protocol.model_dump()], default=str)
        if key not in known:
            if a.measured_steps and not a.quiet:
                print(f"Measuring {a.measured_steps:,} steps of {c.env} ...", file=sys.stderr)
            known[key] = measure(plan, a.measured_steps) if a.measured_steps else None
        speeds.append(known[key])
    print(json.dumps(figures(plans, speeds)) if a.json else describe(plans, speeds))


def _compare(a: Namespace) -> None:
    from lacer.search.compare import compare_runs, default_folder, find_runs, plan_comparison, run_comparison
    from lacer.search.compare_report import PAGE, figures, statements

    over = a.as_dict()
    base = _given(a, tuple(k for k in over if k != "base")).get("base", {})
    levels = _numbers(a.levels, "--levels", float)
    if a.resume is None and a.what and not _names_a_file(a.what):
        wrong = [f"--{k.replace('_', '-')}" for k in ("seeds", "designers", "envs") if over[k] is not None]
        wrong += ["--base"] if base else []
        wrong += ["--dry-run"] if a.dry_run else []
        if wrong:
            raise LacerError(f"{wrong[0]} is for a comparison that is to be run; {a.what[0]} is a folder")
        folder = Path(a.out) if a.out else default_folder("runs")
        allow = [w.strip() for w in (a.allow or "").split(",") if w.strip()]
        result = compare_runs(find_runs(a.what), folder, allow=allow, levels=levels)
    else:
        if a.allow is not None:
            raise LacerError("--allow is for finished runs; the searches of a comparison are alike")
        config, folder = _comparison(a, base, levels)
        if a.dry_run:
            planned = plan_comparison(config)
            return _dry_run([(s.name, p) for s, p in zip(planned.searches, planned.plans, strict=True)], a)
        result = run_comparison(config, folder, resume=a.resume is not None, quiet=a.quiet)
    if a.json:
        print(json.dumps(figures(result) | {"folder": str(folder), "page": str(folder / PAGE)}, allow_nan=False))
        return
    ranking = result.ranking
    for env in result.envs:
        rows = ranking[ranking["environment"] == env]
        o = result.objectives[env]
        score = f"{'best' if result.plain else 'final'} {o.metric.replace('_', ' ')} {o.unit}".rstrip()
        print(f"\n{env}{': ' if env else ''}{score}, interquartile mean over seeds [95 % bootstrap interval]")
        width = max(len(str(n)) for n in rows["designer"]) if len(rows) else 0
        for r in rows.itertuples():
            interval = f"[{r.low:.4g}, {r.high:.4g}]  {r.seeds} seeds" if r.seeds > 1 else " (one seed: no interval)"
            print(f"  {r.designer:{width}}  {r.iqm:.4g} {interval}")
    print("\n" + "\n".join(statements(result)))
    for note in result.notes:
        print(note)
    print(f"\nPage: {folder / PAGE}")


def _names_a_file(words: list[str]) -> bool:
    """Whether a comparison is to be run, not runs compared. Raises LacerError for several files."""
    files = [w for w in words if not Path(w).is_dir() and not set(w) & set("=*?[") and not (
        len(words) > 1 and "/" in w and not w.endswith((".yaml", ".yml")))]
    if files and len(words) > 1:
        raise LacerError(f"{files[0]} is no run folder. Give either one comparison's file, or finished runs")
    return bool(files)


def _comparison(a: Namespace, base: dict[str, Any], levels: list[float]) -> tuple[Any, Path]:
    """The configuration of a comparison and its folder. Raises LacerError."""
    from lacer.search.compare import ComparisonConfig, default_folder, read_comparison
    from lacer.search.designers.base import designer_class

    if (a.resume is None) == (not a.what):
        raise LacerError("give either a comparison's file, a preset, finished runs, or --resume FOLDER"
                         f" (presets: {', '.join(presets('comparisons'))})")
    if a.resume is not None:
        if a.out is not None:
            raise LacerError("--out and --resume exclude each other: a comparison stays in its folder")
        data, folder, where = read_comparison(Path(a.resume)).model_dump(mode="json"), Path(a.resume), a.resume
    else:
        where = a.what[0]
        data = read_yaml(where, "comparisons", "comparison")
        validate_as(ComparisonConfig, data, where)
        folder = Path(a.out) if a.out else default_folder(Path(where).name.split(".")[0])
    data = {**data, "base": merge(data.get("base", {}), base)}
    if a.seeds is not None:
        data["seeds"] = _numbers(a.seeds, "--seeds", int)
    if levels:
        data["levels"] = levels
    if a.designers is not None:
        names = [n.strip() for n in a.designers.split(",") if n.strip()]
        for n in names:
            if n not in data["designers"]:
                designer_class(n)
        data["designers"] = {n: data["designers"].get(n, {"designer": n}) for n in names}
    if a.envs is not None:
        known = data.get("envs") or {}
        data["envs"] = {n.split("/")[-1]: known.get(n, {"env": n}) for n in map(str.strip, a.envs.split(",")) if n}
    return validate_as(ComparisonConfig, data, str(where)), folder


def _numbers(text: str | None, option: str, kind: type) -> list[Any]:
    try:
        return [kind(x) for x in (text or "").split(",") if x.strip()]
    except ValueError:
        raise LacerError(f"{option} {text!r}: numbers, separated by commas") from None


def _watch(a: Namespace) -> None:
    from lacer.search.watch import watch

    if not 0.05 <= a.interval <= 3600:
        raise LacerError(f"--interval must lie between 0.05 and 3600 seconds, not {a.interval:g}")
    if not watch(a.run, lambda text: print(text, flush=True), study_name=a.study_name, interval=a.interval):
        sys.exit(1)


def _export(a: Namespace) -> None:
    from lacer.search.export import check_file, export

    check_file(a.out)
    table = export(Path(a.run), None if a.out is None else Path(a.out), curves=a.curves)
    if a.out is None:
        table.to_csv(sys.stdout, index=False)
    else:
        print(f"{len(table):,} row{'s' if len(table) != 1 else ''}: {a.out}")


def _train(a: Namespace) -> None:
    from datetime import datetime

    from lacer.agents import RunRequest, run
    from lacer.encoders import EncoderSpec
    from lacer.envs import task_card
    from lacer.search.progress import Display

    over = {k: a[k] for k in ("env", "env_kwargs") if a[k] is not None}
    config = validate(merge(read_yaml(a.config) if a.config else {}, over), a.config or "train")
    for name, value in (("--steps", a.steps), ("--episodes", a.episodes)):
        if value < 1:
            raise LacerError(f"{name} must be at least 1, not {value}")
    _check_seed(a.seed)
    path = Path(a.encoder)
    card = task_card(config.env, **config.env_kwargs)
    spec = EncoderSpec.load(path / "encoder.json" if path.is_dir() else path, card)
    out = Path(a.out) if a.out else Path("agents") / f"{datetime.now():%Y%m%d-%H%M%S}-{card.env_id.split('/')[-1]}"
    if out.exists():
        raise LacerError(f"{out} exists already; choose another folder with --out")
    try:
        out.mkdir(parents=True)  # now: what cannot be saved need not be trained
        out.rmdir()
    except OSError as e:
        raise LacerError(f"cannot write the agent folder {out}: {e.strerror}") from None
    protocol = config.protocol.model_copy(update={"steps": a.steps, "eval_episodes": a.episodes})
    display = Display(card, a.steps)
    display.started("train", spec.short(), a.steps)
    request = RunRequest(env=config.env, env_kwargs=config.env_kwargs, eval_env_kwargs=config.eval_env_kwargs,
                         encoder=spec.to_dict(), protocol=protocol, seed=a.seed, text_model=config.text_model,
                         save_to=str(out))
    try:
        result = run(request, lambda p: display.progress("train", p))
    finally:
        display.close()
    if not result.ok:
        print(f"lacer: the training failed: {result.reason}", file=sys.stderr)
        sys.exit(1)
    o = card.objective
    also = "" if o.metric == "return" else f", return {result.mean_return:.3f}"
    print(f"{o.metric} {result.objective:.3f}{' ' + o.unit if o.unit else ''}{also} over "
          f"{a.episodes} held-out episodes, {result.cost.steps_per_second:.0f} steps/s\nAgent: {out}\n"
          f"Next:  lacer evaluate {shlex.quote(str(out))}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= LARGEST_SEED:
        raise LacerError(f"--seed must lie between 0 and {LARGEST_SEED}, not {seed}")


def _evaluate(a: Namespace) -> None:
    from lacer.agents import load
    from lacer.agents.ppo import evaluate
    from lacer.agents.stats import mean_interval
    from lacer.agents.video import can_render, check_video, play, write_video

    if a.episodes < 1:
        raise LacerError(f"--episodes must be at least 1, not {a.episodes}")
    _check_seed(a.seed)
    if a.video is not None:
        check_video(Path(a.video))
    agent = load(a.agent, a.env_kwargs)
    r = agent.request
    kwargs = {**r.env_kwargs, **r.eval_env_kwargs, **(a.env_kwargs or {})}
    if a.video is not None and not can_render(r.env, kwargs):
        raise LacerError(f"{r.env} cannot be rendered: it has no render mode rgb_array, so there is no video of it")
    protocol = r.protocol.model_copy(update={"eval_episodes": a.episodes, "eval_seed": a.seed})
    episodes = evaluate(agent.policy, agent.card, agent.table, r.env, kwargs, protocol)
    rows = {"return": episodes.returns, **episodes.metrics}
    stats = {k: mean_interval(v) for k, v in rows.items()}
    importance: dict[str, float] = {}
    if a.video is not None:
        episode = play(agent, seed=a.seed, env_kwargs=a.env_kwargs)
        write_video(Path(a.video), agent, episode)
        importance = {k: float(v.mean()) for k, v in episode.importance.items()}
    if a.json:
        shown = {} if a.video is None else {"video": a.video, "importance": importance}
        print(json.dumps({"agent": str(a.agent), "episodes": a.episodes, "seed": a.seed, **shown,
                          "metrics": {k: dict(zip(("mean", "iqm", "low", "high"), v, strict=True))
                                      for k, v in stats.items()}}))
        return
    unit = {agent.card.objective.metric: agent.card.objective.unit}
    print(f"{r.env}, {a.episodes} episodes from seed {a.seed}: mean, interquartile mean, 95 % bootstrap interval")
    for k, (mean, iqm, low, high) in stats.items():
        print(f"  {k:24} {mean:10.3f} {iqm:10.3f}  [{low:.3f}, {high:.3f}] {unit.get(k, '')}")
    if a.video is not None:
        print(f"Video: {a.video} (seed {a.seed}). Change of its actions when a source shows another moment, nats:")
        print("  " + ", ".join(f"{k} {v:.2g}" for k, v in sorted(importance.items(), key=lambda x: -x[1])))


def _list(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:{width}}  {text}")


def _envs(a: Namespace) -> None:
    if a.env is None:
        _list(list_envs())
        print("and any id of Gymnasium, MiniGrid, BabyAI or highway-env; module:Id for your own")
        return
    from lacer.envs import task_card

    print(task_card(a.env, **(a.env_kwargs or {})))


def _blocks(a: Namespace) -> None:
    from lacer.encoders import list_blocks

    if a.name is None:
        _list({f"{modality}:{name}": cls.summary() for (modality, name), cls in list_blocks().items()})
        return
    from lacer.search.show import block_page, find_blocks

    console = Console(highlight=False)
    for i, cls in enumerate(find_blocks(a.name)):
        if i:
            console.print()
        console.print(block_page(cls))


def _show(a: Namespace) -> None:
    from lacer.search.show import check_picture, encoder_and_task, show

    if a.depth < 0:
        raise LacerError(f"--depth must be at least 0, not {a.depth}")
    check_picture(a.out)
    default = str(SearchConfig.model_fields["env"].default)
    show(*encoder_and_task(a.encoder, a.env, a.env_kwargs, default), a.depth, a.out, Path(a.encoder))


def _prompt(a: Namespace) -> None:
    from lacer.search.llm.shown import conversation

    print(conversation(Path(a.run), a.number))


def _sync(a: Namespace) -> None:
    from lacer.search.wandb_sync import sync

    print(sync(Path(a.run)))


def _designers(_: Namespace) -> None:
    from lacer.search.designers.base import designers

    _list({name: cls.summary() + (" (needs an LLM)" if cls.needs_llm else " (trains by itself)" if cls.trains else "")
           for name, cls in designers().items()})


def _bench(a: Namespace) -> None:
    from datetime import datetime

    from lacer.search.bench import bench
    from lacer.search.bench_report import figures, summary

    config = validate_as(BenchConfig, _given(a, ("out", "quiet", "json")), "--")
    name = Path(config.table or str(config.function).split(":")[-1]).name.split(".")[0]
    folder = Path(a.out) if a.out else Path("bench") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    result = bench(config, folder, quiet=a.quiet or a.json)
    print(json.dumps(figures(result)) if a.json else f"{summary(result)}\nAll of it: {folder}")


def _bench_make(a: Namespace) -> None:
    from datetime import datetime

    from lacer.search.composite_bench import make_table

    given = _given(a, ("config", "out", "resume", "quiet"))
    if a.resume is not None:
        if a.config is not None or a.out is not None:
            raise LacerError("--resume goes on with a folder and its own configuration: leave --config and --out out")
        config, folder = resumed(TableConfig, Path(a.resume), given), Path(a.resume)
    else:
        base = read_yaml(a.config, "bench", "table's configuration") if a.config is not None else {}
        if a.config is not None:
            validate_as(TableConfig, base, a.config)
        config = validate_as(TableConfig, merge(base, given), "--")
        name = config.env.split("/")[-1].split(":")[-1]
        folder = Path(a.out) if a.out else Path("bench") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    print(make_table(config, folder, resume=a.resume is not None, quiet=a.quiet))


def _ranker(a: Namespace) -> None:
    import torch

    from lacer.search.ranker.train import Training, train

    t = a["train"]
    given: dict[str, Any] = {k: t[k] for k in ("steps", "seed", "width", "layers", "longest") if t[k] is not None}
    for key, value in given.items():
        if value < (0 if key == "seed" else 1):
            raise LacerError(f"--{key} must be at least {0 if key == 'seed' else 1}, not {value}")
    torch.set_num_threads(1)  # small matrices, and the same sums on any number of cores
    if t.without:
        given["without"] = tuple(s.strip() for s in t.without.split(","))
    train(Training(**given, prune=not t.no_prune), Path(t.out), resume=t.resume, every=t.every)
    print(Path(t.out) / "weights.safetensors")


if __name__ == "__main__":
    main()
