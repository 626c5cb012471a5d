"""How a command reads its arguments: former names of options, and options that are given twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

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
