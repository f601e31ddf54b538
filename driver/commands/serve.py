"""`infc serve`: a model behind the OpenAI API."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, get_args

import click

from ...runtime.replicas.policy_names import PolicyName
from ...runtime.server.settings import Limit, limits
from ..engine_options import engine_options
from ..set_option import set_option

_SAGEMAKER_DRAIN_SECONDS = 25.0  # it kills the container 30 s after SIGTERM


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each numeric setting of the server, in the order of their declaration."""
    for limit in reversed(list(limits())):
        command = _option_of(limit)(command)
    return command


def _option_of(limit: Limit) -> Callable[[Callable[..., None]], Callable[..., None]]:
    default = "" if limit.default is None else f"  [default: {limit.default:.12g}]"
    return click.option(
        limit.flag,
        type=int if limit.is_whole else float,
        metavar=limit.unit.upper(),
        help=f"{limit.doc}{default}",
    )


def _read_key(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """The key in a file: its first line."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            key = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise click.BadParameter(f"{path} cannot be read: {reason}") from None
    if not key:
        raise click.BadParameter(f"the first line of {path} is empty")
    return key


@click.command("serve")
@click.argument("model", required=False)
@set_option
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="[default: 8000]")
@click.option(
    "--model-name",
    "--served-model-name",
    metavar="NAME",
    multiple=True,
    help="Name of the model in the API; repeatable.  [default: its own]",
)
@click.option(
    "--api-key", envvar="INFC_API_KEY", help="API key that clients must send; or $INFC_API_KEY."
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    callback=_read_key,
    help="Read the API key from the first line of a file.",
)
@click.option("--open-metrics", is_flag=True, help="Allow /metrics without the API key.")
@click.option(
    "--sagemaker",
    is_flag=True,
    envvar="INFC_SAGEMAKER",
    help="Serve as SageMaker expects it: /ping and /invocations, /opt/ml/model, all addresses, port"
    " 8080; or $INFC_SAGEMAKER.",
)
@click.option(
    "--replicas",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Engines in processes of their own, which share the weights and the threads; 0 for one"
    " in the process of the server.",
)
@click.option(
    "--routing",
    type=click.Choice(get_args(PolicyName)),
    default=get_args(PolicyName)[0],
    show_default=True,
    help="Which replica gets a request.",
)
@engine_options
@click.option(
    "--itl-target-ms",
    type=click.IntRange(min=0),
    help="Target for the inter-token latency, by splitting prompts; 0 for none.",
)
@click.option("--log-requests", is_flag=True, help="Log a line for each request on stderr.")
@click.option("--log-prompts", is_flag=True, help="Include the prompts in the log.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Plain text, or one JSON object per line.",
)
@click.option(
    "--verify",
    type=click.Choice(["stamp", "full", "none"]),
    default="stamp",
    show_default=True,
    help="Which files to check first: changed ones, all, or none.",
)
@_limit_options
def command(
    model: str | None,
    overrides: tuple[str, ...],
    host: str | None,
    port: int | None,
    model_name: tuple[str, ...],
    api_key: str | None,
    api_key_file: str | None,
    threads: int | None,
    weights: str | None,
    max_context: int | None,
    max_sequences: int | None,
    kv_memory: str | None,
    itl_target_ms: int | None,
    replicas: int,
    routing: str,
    sagemaker: bool,
    verify: str,
    log_prompts: bool,
    log_requests: bool,
    **settings: Any,
) -> None:
    """Serve a model over HTTP, compatible with the OpenAI API.

    MODEL is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory, a GGUF
    file or a hub id. A model that is not compiled yet is compiled first and stored in the cache.

    \b
      infc serve tiny
      infc serve Qwen/Qwen2.5-0.5B-Instruct --set quantization=int8
      infc serve tiny.infc --host 0.0.0.0 --port 80 --api-key-file key.txt
      curl localhost:8000/v1/completions -d '{"model": "tiny", "prompt": "def"}' \\
           -H 'Content-Type: application/json'
    """
    from typing import cast

    from ...ir.artifact import Verification
    from ...runtime.options import RuntimeOptions
    from ...runtime.server.listener import check_address
    from ...runtime.server.run import serve
    from ..open_model import artifact_and_names

    if api_key is not None and not api_key.strip():
        raise click.UsageError("the API key is empty: pass a key, or omit the option")
    if api_key is not None and api_key_file is not None and api_key != api_key_file:
        raise click.UsageError("--api-key (or $INFC_API_KEY) and --api-key-file cannot be combined")
    options = RuntimeOptions(
        threads=threads,
        weights=weights,
        max_context=max_context,
        max_sequences=max_sequences,
        kv_memory=kv_memory,
        itl_target_ms=itl_target_ms,
    )
    model, host, port = _place(model, host, port, sagemaker)
    check_address(host, port)
    if sagemaker and settings.get("drain_seconds") is None:
        settings["drain_seconds"] = _SAGEMAKER_DRAIN_SECONDS
    path, names = artifact_and_names(model, overrides)
    interrupted = serve(
        path,
        host=host,
        port=port,
        model_name=model_name or names,
        api_key=api_key_file or api_key,
        options=options,
        verify=cast("Verification", verify),
        log_requests=log_requests or log_prompts,
        log_prompts=log_prompts,
        replicas=replicas,
        routing=routing,
        sagemaker=sagemaker,
        **{name: value for name, value in settings.items() if value is not None},
    )
    if interrupted:  # as shells expect it; that it stopped cleanly is no error to print
        raise click.exceptions.Exit(128 + signal.SIGINT)


def _place(
    model: str | None, host: str | None, port: int | None, sagemaker: bool
) -> tuple[str, str, int]:
    """What is served, and where: what SageMaker prescribes, if nothing else is said."""
    if model is None and not sagemaker:
        raise click.UsageError("missing argument 'MODEL'")
    if not sagemaker:
        return model or "", host or "127.0.0.1", 8000 if port is None else port
    if port is None:
        stated = os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080")
        if not stated.isdecimal() or int(stated) > 65535:
            raise click.UsageError(f"$SAGEMAKER_BIND_TO_PORT is {stated!r}, and no port")
        port = int(stated)
    return model or "/opt/ml/model", host or "0.0.0.0", port
