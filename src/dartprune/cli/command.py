"""How commands read their arguments: former names, options that are given twice, options that several share."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand

# how options were called once, for scripts that have them
FORMER = {"--arms": "--method", "--sparsities": "--sparsity", "--batch-size": "--batch"}


class Command(TyperCommand):
    """A command that knows the former names of its options and refuses to choose between two values of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; a usage error for an option that takes one value and is given several."""
        args = [self._renamed(argument) for argument in args]
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(given).items():
            once = parameter.param_type_name == "option" and not parameter.multiple
            if once and times > 1 and not ctx.resilient_parsing:
                raise typer.BadParameter(f"{parameter.opts[0]} is given {times} times and takes one value")
        return super().parse_args(ctx, args)

    def _renamed(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        mine = {option for parameter in self.params for option in parameter.opts}
        if name in mine or FORMER.get(name) not in mine:
            return argument
        return f"{FORMER[name]}{equals}{value}"


def shares_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the last parameter of a command is a dataclass, whose fields stand for options that several have."""
    signature = inspect.signature(function, eval_str=True)
    *own, last = signature.parameters.values()
    hints = get_type_hints(last.annotation, include_extras=True)
    names = [item.name for item in fields(last.annotation)]

    def call(**given: Any) -> None:
        shared = last.annotation(**{name: given.pop(name) for name in names})
        function(**given, **{last.name: shared})

    more = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=hints[item.name])
        for item in fields(last.annotation)
    ]
    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *more]
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call
