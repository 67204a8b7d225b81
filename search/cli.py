"""The command line: ``lacer search | train | evaluate | show | prompt | envs | blocks | designers``."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any, NoReturn, get_args

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console

from lacer.envs import LacerError, did_you_mean, list_envs
from lacer.search.config import COMMON, BenchConfig, SearchConfig, TableConfig, resumed, validate, validate_as
from lacer.search.presets import read_yaml

EXAMPLES = {
    "search": """examples:
  lacer search --config quick
  lacer search --env lacer/MixedTraffic-v0 --designer evolution --candidates 20
  lacer search --env lacer/MixedTraffic-v0 --designer lacer --llm openai:MODEL --llm-base-url URL --candidates 50
  lacer search --config my.yaml --protocol.steps 20000 --seed 1
  lacer search --resume runs/20260101-120000-MixedTraffic-v0-evolution""",
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
    "prompt": """examples:
  lacer prompt runs/R 7
  lacer prompt runs/R 7 | less""",
    "sync": """examples:
  lacer sync runs/R
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


NESTED = ("protocol", "ppo", "limits")
"""Fields of the configuration that are models of their own."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _get_help_string(self, action: Any) -> str:
        return action.help or ""  # the texts name their defaults; jsonargparse would add "type, default: null"


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line on standard error and exit code 2; unknown options get "did you mean"."""
        known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
        unknown = [w for w in message.split() if w.startswith("--") and w.split("=")[0] not in known]
        hint = did_you_mean(unknown[0].split("=")[0], known) if unknown and "nrecognized" in message else ""
        fail(f"{message.strip()}{hint.rstrip('.')}\nSee `{self.prog.replace(' [options]', '')} --help`.")


def fail(message: str) -> NoReturn:
    """Prints an error and exits with 2."""
    print(f"lacer: error: {message}", file=sys.stderr)
    sys.exit(2)


def _add_fields(parser: ArgumentParser, model: type[BaseModel], prefix: str = "", only: set[str] | None = None) -> None:
    """One option per field, nested models as ``--protocol.steps``; without a value it is left to config or default."""
    for name, f in model.model_fields.items():
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


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for k, v in over.items():
        out[k] = _merge(out[k], v) if k in NESTED and isinstance(out.get(k), dict) else v
    return out


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
    p.add_argument("--config", default=None, metavar="FILE", help="YAML file, or preset: quick, full; options win")
    p.add_argument("--resume", default=None, metavar="RUN", help="go on with a run folder")
    p.add_argument("--out", default=None, metavar="FOLDER", help="run folder (default: runs/<date-time-env-designer>)")
    p.add_argument("--quiet", action="store_true", help="print nothing but the result")
    _add_fields(p, SearchConfig)

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

    p = command("sync", "upload what a search logged offline to Weights & Biases")
    p.add_argument("run", metavar="RUN", help="run folder, e.g. runs/R")

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
    return parser


def parse(argv: list[str]) -> Namespace:
    """The arguments of a command line. Exits with 2 if they are wrong."""
    if argv[:2] == ["bench", "make"]:  # `bench` itself has options, so `make` cannot be a command below it
        argv = ["bench-make", *argv[2:]]
    return _parser().parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``lacer`` command."""
    logging.basicConfig(level=logging.WARNING, format="lacer: %(message)s")
    warnings.filterwarnings("ignore", module="optuna")
    args = parse(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:  # for module:Id in the working folder; last, so that it shadows nothing
        sys.path.append(os.getcwd())
    try:
        {"search": _search, "train": _train, "evaluate": _evaluate, "show": _show, "prompt": _prompt, "envs": _envs,
         "blocks": _blocks, "sync": _sync, "designers": _designers, "bench": _bench,
         "bench-make": _bench_make}[args.command](args[args.command])
    except LacerError as e:
        fail(str(e))
    except KeyboardInterrupt:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(130)  # at once: an LLM's reply or a tracker may still be awaited in a thread


def _search(a: Namespace) -> None:
    from lacer.search.loop import search, summary
    from lacer.search.progress import candidate_table

    given = _given(a, ("config", "resume", "out", "quiet"))
    if a.resume is not None:
        if a.config is not None:
            raise LacerError("--config and --resume exclude each other: a run keeps its own configuration")
        result = search(resume=a.resume, out=a.out, quiet=a.quiet, **given)
    else:
        base = read_yaml(a.config) if a.config is not None else {}
        if a.config is not None:
            validate(base, a.config)  # names the file if a key of it is wrong
        merged = _merge(base, given)
        validate(merged, "--")  # what is wrong now was given as an option
        result = search(out=a.out, quiet=a.quiet, **merged)
    console = Console(highlight=False)
    console.print()
    # Wide enough for all sources also where the output is a file; a terminal keeps its own width.
    (console if console.is_terminal else Console(width=160, highlight=False)).print(candidate_table(result.outcome))
    print("\n" + summary(result))
    if result.outcome.winner is None:
        sys.exit(1)


def _train(a: Namespace) -> None:
    from datetime import datetime

    from lacer.agents import RunRequest, run
    from lacer.encoders import EncoderSpec
    from lacer.envs import task_card
    from lacer.search.progress import Display

    over = {k: a[k] for k in ("env", "env_kwargs") if a[k] is not None}
    config = validate(_merge(read_yaml(a.config) if a.config else {}, over), a.config or "train")
    for name, value in (("--steps", a.steps), ("--episodes", a.episodes)):
        if value < 1:
            raise LacerError(f"{name} must be at least 1, not {value}")
    path = Path(a.encoder)
    card = task_card(config.env, **config.env_kwargs)
    spec = EncoderSpec.load(path / "encoder.json" if path.is_dir() else path, card)
    out = Path(a.out) if a.out else Path("agents") / f"{datetime.now():%Y%m%d-%H%M%S}-{card.env_id.split('/')[-1]}"
    if out.exists():
        raise LacerError(f"{out} exists already; choose another folder with --out")
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
    print(f"{card.objective.metric} {result.objective:.3f} {card.objective.unit}, return {result.mean_return:.3f} over "
          f"{a.episodes} held-out episodes, {result.cost.steps_per_second:.0f} steps/s\nAgent: {out}\n"
          f"Next:  lacer evaluate {shlex.quote(str(out))}")


def _evaluate(a: Namespace) -> None:
    from lacer.agents import load
    from lacer.agents.ppo import evaluate
    from lacer.agents.stats import mean_interval
    from lacer.agents.video import can_render, check_video, play, write_video

    if a.episodes < 1:
        raise LacerError(f"--episodes must be at least 1, not {a.episodes}")
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
        print("  " + ", ".join(f"{k} {v:.2f}" for k, v in sorted(importance.items(), key=lambda x: -x[1])))


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
        config = validate_as(TableConfig, _merge(base, given), "--")
        name = config.env.split("/")[-1].split(":")[-1]
        folder = Path(a.out) if a.out else Path("bench") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    print(make_table(config, folder, resume=a.resume is not None, quiet=a.quiet))


if __name__ == "__main__":
    main()
