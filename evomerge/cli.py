"""The command line: one command per verb, no logic. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from evomerge import __version__
from evomerge.commands.streams import standard_streams
from evomerge.errors import InputError
from evomerge.startup import collect_garbage_rarely

app = typer.Typer(
    name="evomerge",
    help="Search for the best way to merge language models that already exist.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SearchFileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A search file (YAML).")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a search.")]
OutArgument = Annotated[
    str, typer.Argument(metavar="OUT", help="The model folder to make, or a URL in object storage: s3://bucket/merged.")
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value of the search file; repeatable.")
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server", metavar="URL", help="Ask this server: DIR is the search's name, EVOMERGE_TOKEN holds the token."
    ),
]
RankOption = Annotated[
    str | None,
    typer.Option(metavar="N|full", help="The rank of each module, 32 by default; with --energy the largest."),
]
EnergyOption = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="The lowest ranks that hold this share of a change's energy, such as 0.99."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"evomerge {__version__}")
        raise typer.Exit


@app.command()
def validate(
    file: SearchFileArgument,
    set_: SetOption = [],  # noqa: B006 (typer copies it)
    show_prompt: Annotated[
        bool,
        typer.Option("--show-prompt", help="Print a prompt of each objective as a model reads it, and its tokens."),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Check a search file and everything it names. Prints the plan; nothing is scored."""
    from evomerge.commands.run import validate

    validate(file, set_, show_prompt=show_prompt, as_json=json_)


@app.command()
def select(
    file: SearchFileArgument,
    set_: SetOption = [],  # noqa: B006
    json_: JsonOption = False,
) -> None:
    """Choose among many sources, before a search.

    A search whose file says `select:` does this first. Prints the table; nothing is searched.
    """
    from evomerge.commands.run import select

    raise typer.Exit(select(file, set_, as_json=json_))


@app.command()
def search(
    file: SearchFileArgument,
    dir_: Annotated[Path | None, typer.Option("--dir", help="Folder to make; searches/NAME by default.")] = None,
    set_: SetOption = [],  # noqa: B006
    address: Annotated[
        str | None, typer.Option(metavar="auto|ray://...|http://...", help="Run it as a job of this Ray cluster.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With --address: do not follow the job's log.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Join a cluster that requires no token.")] = False,
) -> None:
    """Run a search until its budget is spent. Then its best candidates are confirmed on the held-out split."""
    settings = [*set_, "cluster.insecure=true"] if insecure else set_
    if address is not None:
        from evomerge.search.clusters.launch import launch

        raise typer.Exit(launch(file, dir_, settings, address, detach=detach, insecure=insecure))
    from evomerge.commands.run import search

    raise typer.Exit(search(file, dir_, settings))


@app.command("list")
def list_(
    root: Annotated[
        str, typer.Argument(metavar="ROOT|DATABASE-URL", help="A folder of searches, or a database.")
    ] = "searches",
    address: Annotated[
        str | None, typer.Option(metavar="auto|ray://...|http://...", help="List the jobs of this Ray cluster.")
    ] = None,
    server: ServerOption = None,
) -> None:
    """List searches. Of a folder, of a Ray cluster that runs them as jobs, or of a server."""
    from evomerge.commands.listing import list_folder, list_jobs, list_server

    if server is not None:
        list_server(server)
    elif address is not None:
        list_jobs(address)
    else:
        list_folder(root)


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a search, or the URL of its copy.")],
    dir_: Annotated[
        Path | None, typer.Option("--dir", help="With a URL: folder to make; searches/NAME by default.")
    ] = None,
    set_: SetOption = [],  # noqa: B006
    server: ServerOption = None,
) -> None:
    """Continue a search. After an interruption, or with a larger budget: --set budget.candidates=N."""
    if server is not None:
        from evomerge.commands.remote import resume as resume_there

        resume_there(server, folder, set_)
        return
    from evomerge.commands.run import resume

    raise typer.Exit(resume(folder, set_, dir_))


@app.command()
def status(
    folder: FolderArgument,
    json_: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until the search ends.")] = False,
    server: ServerOption = None,
) -> None:
    """Show the status of a search."""
    if server is not None:
        from evomerge.commands.remote import status as status_there

        status_there(server, str(folder), as_json=json_, watch=watch)
        return
    from evomerge.commands.look import status

    status(folder, as_json=json_, watch=watch)


@app.command()
def observe(
    folder: FolderArgument,
    observers: Annotated[
        list[str], typer.Argument(metavar="OBSERVER...", help="As in a search file: '{kind: prometheus, port: 9090}'.")
    ],
) -> None:
    """Report a search to observers. Sends its events to Prometheus, TensorBoard and others until no driver runs."""
    from evomerge.commands.observe import observe

    raise typer.Exit(observe(folder, observers))


@app.command()
def pause(folder: FolderArgument, server: ServerOption = None) -> None:
    """Start nothing new until `resume`; running attempts finish."""
    _command(folder, "pause", server)


@app.command()
def stop(folder: FolderArgument, server: ServerOption = None) -> None:
    """Let running attempts finish, then end. The search can be resumed."""
    _command(folder, "stop", server)


@app.command()
def cancel(folder: FolderArgument, server: ServerOption = None) -> None:
    """End now. The search can be resumed."""
    _command(folder, "cancel", server)


@app.command()
def top(
    folder: FolderArgument,
    k: Annotated[int, typer.Option("-k", help="How many.", min=1)] = 10,
    all_: Annotated[bool, typer.Option("--all", help="Every candidate, in the order asked.")] = False,
    json_: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """List the best candidates."""
    if server is not None:
        from evomerge.commands.remote import top as top_there

        top_there(server, str(folder), None if all_ else k, as_json=json_)
        return
    from evomerge.commands.look import top

    top(folder, None if all_ else k, as_json=json_)


@app.command()
def show(
    folder: FolderArgument,
    candidate: Annotated[str, typer.Argument(metavar="ID", help="A candidate, such as c0042, a source, best, knee.")],
    json_: JsonOption = False,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print only its recipe, for `evomerge merge`.")] = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw its path into an SVG file.")] = None,
    items: Annotated[bool, typer.Option("--items", help="Print every item that it was scored on.")] = False,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Print what it is asked: a prompt of each objective, and its tokens.")
    ] = False,
) -> None:
    """Show one candidate. Its path, recipe, scores, answers, attempts and log."""
    from evomerge.commands.look import show, show_items, show_prompt

    if prompt:
        show_prompt(folder, candidate)
    elif items:
        show_items(folder, (candidate,), as_json=json_)
    else:
        show(folder, candidate, as_json=json_, as_recipe=recipe, picture=picture)


@app.command()
def compare(
    folder: FolderArgument,
    a: Annotated[str, typer.Argument(metavar="A", help="A candidate, such as c0042, a source, best, knee.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    json_: JsonOption = False,
    items: Annotated[bool, typer.Option("--items", help="Print the items that they differ on, with answers.")] = False,
) -> None:
    """Compare two candidates item by item. Shows paired differences with the interval of a single comparison."""
    from evomerge.commands.look import compare, show_items

    if items:
        show_items(folder, (a, b), as_json=json_)
    else:
        compare(folder, a, b, as_json=json_)


@app.command()
def curse(
    folder: FolderArgument,
    json_: JsonOption = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot it into an SVG file.")] = None,
) -> None:
    """Show the winner's curse. How far the best search scores drop on held-out items."""
    from evomerge.commands.look import curse

    curse(folder, as_json=json_, picture=picture)


@app.command()
def report(
    folder: FolderArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write; report.html in DIR by default.")
    ] = None,
) -> None:
    """Write a search as one HTML file. It has pictures, tables, settings, and the commands to reproduce it."""
    from evomerge.commands.report import report

    report(folder, out)


@app.command()
def confirm(folder: FolderArgument) -> None:
    """Score the best on the held-out split. Scores the front and the best candidates, and names the winner."""
    from evomerge.commands.run import confirm

    raise typer.Exit(confirm(folder))


@app.command()
def team(
    folder: FolderArgument,
    members: Annotated[int, typer.Option("-k", "--members", help="Number of candidates in it, 2 to 8.")] = 3,
    json_: JsonOption = False,
) -> None:
    """Choose candidates that together solve most items. They are scored on the held-out split."""
    from evomerge.commands.run import team

    raise typer.Exit(team(folder, members, as_json=json_))


@app.command()
def export(
    folder: FolderArgument,
    out: OutArgument,
    candidate: Annotated[
        str, typer.Option(help='best, knee, "best at" an objective, an id such as c0042, or a source.')
    ] = "best",
    verify: Annotated[bool, typer.Option(help="Reload it and reproduce the recorded scores.")] = True,
    form: Annotated[
        str | None,
        typer.Option("--as", metavar="FORM", help="For routed experts: `routed` (remote code), `peft` or `mixture`."),
    ] = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write its difference from the base as a LoRA adapter instead.")
    ] = False,
    rank: RankOption = None,
    energy: EnergyOption = None,
    team: Annotated[
        bool, typer.Option("--team", help="Export all members of the team, each to a folder in OUT.")
    ] = False,
) -> None:
    """Write a candidate as a plain Hugging Face model folder."""
    from evomerge.commands.models import export, export_team

    if team and (candidate != "best" or form is not None or as_adapter):
        raise InputError("--team", "is given with --candidate, --as or --as-adapter", "A team is exported as it is.")
    if as_adapter:
        from evomerge.commands.extract import ExtractOptions, export_adapter

        export_adapter(folder, out, candidate, ExtractOptions(rank, energy), verify=verify, form=form)
    elif team:
        export_team(folder, out, verify=verify)
    else:
        export(folder, out, candidate, verify=verify, form=form)


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model or adapter on this machine.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="A place in object storage: s3://bucket/merged.")],
) -> None:
    """Copy a model folder to object storage. Continues an upload that was interrupted."""
    from evomerge.commands.delivering import upload_folder

    upload_folder(folder, url)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe in Evomerge's or mergekit's format.")],
    out: OutArgument,
    calibration: Annotated[
        list[str],
        typer.Option(
            metavar="TEXTS|SOURCE=TEXTS",
            help="Texts that sources are run over, if the method needs them; repeatable, to give texts for one source.",
        ),
    ] = [],  # noqa: B006
    prompts: Annotated[int, typer.Option(min=1, max=100_000, help="How many of the texts to use.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many tokens of each text to use.")] = 512,
    fit: Annotated[
        Path | None,
        typer.Option(metavar="SEARCH.yaml", help="A search file; the recipe is fitted to its `fit` items."),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            help="For tables of tensors: which to merge, `same` (all must have them), `union` or `intersection`."
        ),
    ] = None,
    keep_stages: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For a recipe in stages: write each stage here, in float32.")
    ] = None,
) -> None:
    """Make one merged model from a recipe, without a search."""
    from evomerge.commands.merge import calibration_of, merge

    merge(recipe, out, calibration_of(calibration, prompts, tokens), fit, keep_stages, keys)


@app.command()
def moe(
    model: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="mergekit-moe's YAML; with --prune a mixture.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to make.")],
    architecture: Annotated[
        str | None, typer.Option(help="mixtral, qwen2_moe, qwen3_moe or glm4_moe, instead of the file's.")
    ] = None,
    prune: Annotated[
        int | None, typer.Option(metavar="K", help="Keep the K experts of each layer that the texts use most.")
    ] = None,
    merge: Annotated[bool, typer.Option(help="Merge removed experts into similar ones.")] = True,
    calibration: Annotated[Path | None, typer.Option(metavar="TEXTS", help="Texts, for --prune.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=100_000, help="How many of the texts to use.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many tokens of each text to use.")] = 512,
) -> None:
    """Make a mixture of experts from dense models. With --prune, remove experts from a mixture."""
    from evomerge.commands.moe import assemble_or_prune

    texts = None if calibration is None else (calibration, prompts, tokens)
    assemble_or_prune(model, out, architecture, prune, texts, merged=merge)


@app.command()
def extract(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or model+adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder to make.")],
    base: Annotated[str, typer.Option(metavar="MODEL", help="The model that it was tuned from.")],
    rank: RankOption = None,
    energy: EnergyOption = None,
    embeddings: Annotated[
        str, typer.Option(metavar="FORM", help="How changed embeddings are stored: full, low_rank, tokens or none.")
    ] = "full",
    preset: Annotated[str, typer.Option(help="What is to load it: peft, or vllm, which supports less.")] = "peft",
    verify: Annotated[
        Path | None, typer.Option(metavar="SEARCH.yaml", help="Score it and the model on a search's items.")
    ] = None,
    compare_ranks: Annotated[
        list[str], typer.Option(metavar="N", help="With --verify: also score this rank; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Extract a LoRA adapter from a fine-tuned model. Reports what each part of its change loses."""
    from evomerge.commands.extract import ExtractOptions, extract

    extract(model, base, out, ExtractOptions(rank, energy, embeddings, preset), verify, compare_ranks)


@app.command()
def transplant(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or model+adapter.")],
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="The model whose vocabulary it gets.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to make.")],
    method: Annotated[str, typer.Option(help="How rows of new tokens are made: omp, subword or mean.")] = "omp",
    atoms: Annotated[
        int | None,
        typer.Option(
            "-k", min=1, max=1024, help="With omp: from how many shared tokens each row is made; 64 in wide models."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text to measure predictions on; by default a few pages.")
    ] = None,
) -> None:
    """Give a model the vocabulary of another one. Reports how well it predicts a text before and after."""
    from evomerge.commands.transplant import transplant

    transplant(model, donor, out, method, atoms, text)


@app.command()
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder saved by DeepSpeed ZeRO.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to make.")],
    model: Annotated[Path, typer.Option(metavar="MODEL", help="A folder with its config.json and tokenizer.")],
) -> None:
    """Turn a DeepSpeed ZeRO checkpoint into a plain model folder. It can then be merged."""
    from evomerge.commands.merge import consolidate

    consolidate(checkpoint, out, model)


@app.command()
def serve(
    place: Annotated[str, typer.Argument(metavar="ROOT|DATABASE-URL", help="A folder of searches, or a database.")],
    host: Annotated[str, typer.Option(help="The address to listen on; other machines can reach any but loopback.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes any free port.")] = 8080,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="With a database: where to create folders of new searches.")
    ] = Path("searches"),
    sources: Annotated[
        list[Path], typer.Option(metavar="DIR", help="A folder whose models and data searches may use; repeatable.")
    ] = [],  # noqa: B006
    allow_host: Annotated[
        list[str], typer.Option(metavar="NAME", help="Another host name of this server; repeatable.")
    ] = [],  # noqa: B006
    no_token: Annotated[bool, typer.Option("--no-token", help="Admit everybody who reaches the address.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="auto|http://...", help="Start drivers as jobs of this Ray cluster.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Consent to --no-token for other machines, and to a cluster that requires no token."
        ),
    ] = False,
) -> None:
    """Serve searches to browsers and programs. Prints the link to open; EVOMERGE_TOKEN sets the token."""
    from evomerge.service.server import serve

    serve(
        place, host=host, port=port, folder=folder, sources=sources, names=allow_host, needs_token=not no_token,
        insecure=insecure, address=address,
    )  # fmt: skip


@app.command()
def inspect(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model folders, hub ids, or model+adapter.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that they were tuned from; by default the first of several."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show what models are and how close they are. Compares them layer by layer, to judge what will merge."""
    from evomerge.commands.inspect import inspect

    inspect(models, base, as_json=json_)


@app.command()
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, hub id, or model+adapter.")],
    file: SearchFileArgument,
    set_: SetOption = [],  # noqa: B006
    split: Annotated[Literal["search", "held_out"], typer.Option(help="Which split's items.")] = "held_out",
    json_: JsonOption = False,
) -> None:
    """Score any model on the items of a search file. Scores all of its objectives and constraints."""
    from evomerge.commands.models import score

    score(model, file, set_, split, as_json=json_)


@app.command()
def plugins() -> None:
    """List the parts that a search file can name."""
    from evomerge.commands.plugins import list_plugins

    list_plugins()


@app.command()
def agreement(
    file: Annotated[Path, typer.Argument(metavar="ANSWERS.jsonl", help="Answers, each with its right number.")],
    language: Annotated[str, typer.Option(metavar="CODE", help="The language that answers should be in.")] = "ja",
    json_: JsonOption = False,
) -> None:
    """Grade answers with both scorers of mgsm. Shows where they disagree."""
    from evomerge.commands.agreement import agreement

    agreement(file, language, as_json=json_)


def _command(folder: Path, verb: Literal["pause", "stop", "cancel"], server: str | None) -> None:
    if server is not None:
        from evomerge.commands.remote import send_command as send_there

        send_there(server, str(folder), verb)
        return
    from evomerge.commands.look import send_command

    send_command(folder, verb)


def main(arguments: list[str] | None = None) -> Any:
    """The entry point: exit code 0 when done, 1 when failed, 2 for bad input, 130 when interrupted and resumable."""
    collect_garbage_rarely()
    run: Callable[..., Any] = app
    try:
        with standard_streams():
            try:
                return run(arguments)
            except InputError as error:
                typer.echo(f"error: {error}", err=True)
                sys.exit(2)
            except KeyboardInterrupt:
                sys.exit(130)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(1)
    except InputError as error:  # output that could not be written at the end
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
