"""The cases: mergekit configurations with all of its methods and all ways to configure them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Values = Mapping[str, Any]
"""``parameters:`` of one place of a configuration."""

HALF = 2.0**-7  # one unit in the last place of bfloat16, relative to the largest value of a tensor


@dataclass(frozen=True)
class Case:
    """One merge.

    Attributes:
        name: the method, and what the case tries.
        config: the configuration as mergekit reads it.
        kind: "exact" if both must give the same tensors, "random" if they must have the same distribution.
        tolerance: of an exact case, relative to the largest value of each tensor.
        cut_like: the model whose tokenizer gives the expected tokens of plain texts; None for mergekit's result.
    """

    name: str
    config: dict[str, Any]
    kind: Literal["exact", "random"] = "exact"
    tolerance: float = 1e-5
    cut_like: str | None = None


def all_cases(root: Path) -> list[Case]:
    """Every case, over the models that ``models.make_models`` wrote into ``root``."""
    maker = _Maker(root)
    groups = (
        maker.span, maker.base_variants, maker.task_vectors, maker.selective, maker.values, maker.slices,
        maker.references, maker.dtypes, maker.vocabularies, maker.random,
    )  # fmt: skip
    cases = [case for group in groups for case in group()]
    assert len({case.name for case in cases}) == len(cases), "two cases have one name"
    return cases


# Per-filter values, a gradient, and a fallback, in one.
_T_FILTERED = [
    {"filter": "self_attn", "value": [0.0, 0.5, 0.3, 0.7, 1.0]},
    {"filter": "mlp.down", "value": 0.9},
    {"filter": "mlp", "value": [1.0, 0.2]},
    {"value": 0.4},
]
_W = {"one": {"weight": 0.3}, "two": {"weight": 0.8}, "three": {"weight": 0.5}}
_PAIR = {"one": {"weight": 0.3}, "two": {"weight": 0.8}}


def _with(models: Mapping[str, Values], **more: Values) -> dict[str, dict[str, Any]]:
    """Models with one more parameter each: ``_with(_W, density={"one": 0.3, ...})``."""
    return {name: {**values, **{key: of[name] for key, of in more.items()}} for name, values in models.items()}


class _Maker:
    def __init__(self, root: Path) -> None:
        self._root = root

    def model(self, name: str, family: str = "plain") -> str:
        return str(self._root / family / name)

    def config(
        self,
        method: str,
        models: Mapping[str, Values],
        base: str | None = None,
        *,
        family: str = "plain",
        **top: Any,
    ) -> dict[str, Any]:
        """A configuration with ``models:``; arguments that are not keys of it go to its ``parameters:``."""
        keys = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")
        listed = [
            {"model": self.model(name, family), **({"parameters": dict(values)} if values else {})}
            for name, values in models.items()
        ]
        config: dict[str, Any] = {"merge_method": method, "models": listed, "dtype": "float32"}
        if base is not None:
            config["base_model"] = self.model(base, family)
        config |= {key: top.pop(key) for key in keys if key in top}
        return config | ({"parameters": top} if top else {})

    def sliced(self, method: str, *pieces: dict[str, Any], base: str | None = None, **top: Any) -> dict[str, Any]:
        """A configuration with ``slices:``; see ``piece``."""
        config: dict[str, Any] = {"merge_method": method, "slices": list(pieces), "dtype": "float32"}
        if base is not None:
            config["base_model"] = self.model(base)
        return config | ({"parameters": top} if top else {})

    def piece(self, *sources: tuple[str, int, int, Values], base: str | None = None, **values: Any) -> dict[str, Any]:
        """A slice of (model, first layer, last layer + 1, parameters)."""
        listed = [
            {"model": self.model(name), "layer_range": [first, stop], **({"parameters": dict(own)} if own else {})}
            for name, first, stop, own in sources
        ]
        piece: dict[str, Any] = {"sources": listed}
        if base is not None:
            piece["base_model"] = self.model(base)
        return piece | ({"parameters": values} if values else {})

    # ---- methods -----------------------------------------------------------------------------------------------------

    def span(self) -> Iterator[Case]:
        none: dict[str, Values] = {"one": {}, "two": {}, "three": {}}
        for family in ("plain", "tied", "biased", "wide"):
            yield Case(f"linear / {family}", self.config("linear", _W, family=family))
        yield Case("linear / normalize: false", self.config("linear", _W, normalize=False))
        yield Case("linear / weight below zero", self.config("linear", {**_PAIR, "three": {"weight": -0.4}}))
        yield Case("linear / one model", self.config("linear", {"one": {"weight": 0.7}}))
        for t in (0, 0.3, 1):
            yield Case(f"slerp / t: {t}", self.config("slerp", {"one": {}, "two": {}}, "one", t=t))
        yield Case("slerp / base listed second", self.config("slerp", {"one": {}, "two": {}}, "two", t=0.3))
        yield Case("slerp / unrelated models", self.config("slerp", {"one": {}, "unrelated": {}}, "one", t=0.3))
        yield Case("slerp / tied", self.config("slerp", {"one": {}, "two": {}}, "one", t=0.3, family="tied"))
        for base in (None, "base"):
            for flatten, rows in ((True, False), (False, False), (False, True)):
                how = "flat" if flatten else "columns" if rows else "rows"
                options = {"nuslerp_flatten": flatten, "nuslerp_row_wise": rows}
                yield Case(
                    f"nuslerp / {how}{', base_model' if base else ''}", self.config("nuslerp", _PAIR, base, **options)
                )
        yield Case(
            "nuslerp / biases, row by row",
            self.config("nuslerp", _PAIR, "base", family="biased", nuslerp_flatten=False),
        )
        yield Case(
            "nuslerp / weights of sum 0", self.config("nuslerp", {"one": {"weight": 0.5}, "two": {"weight": -0.5}})
        )
        for base in (None, "base"):
            for normalize in (True, False):
                yield Case(
                    f"multislerp / normalize_weights: {normalize}{', base_model' if base else ''}",
                    self.config("multislerp", _W, base, normalize_weights=normalize),
                )
        yield Case("karcher / three models", self.config("karcher", none))
        yield Case("karcher / two models, tied", self.config("karcher", {"one": {}, "two": {}}, family="tied"))
        yield Case("model_stock / three", self.config("model_stock", none, "base"))
        yield Case("model_stock / two", self.config("model_stock", {"one": {}, "two": {}}, "base"))
        yield Case("model_stock / filter_wise", self.config("model_stock", none, "base", filter_wise=True))
        yield Case(
            "model_stock / filter_wise, biases",
            self.config("model_stock", none, "base", family="biased", filter_wise=True),
        )
        yield Case("passthrough / a copy", self.config("passthrough", {"one": {}}))
        yield Case("passthrough / scale", self.config("passthrough", {"one": {"scale": 0.7}}))
        scales = [{"filter": "o_proj", "value": [0.5, 1.5]}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
        yield Case("passthrough / scale by filters", self.config("passthrough", {"one": {"scale": scales}}))

    def base_variants(self) -> Iterator[Case]:
        """The base listed or not listed among the models, or with its own values."""
        listed = {"base": {}, **_W}
        yield Case("task_arithmetic / base listed first", self.config("task_arithmetic", listed, "base"))
        yield Case("task_arithmetic / base listed last", self.config("task_arithmetic", {**_W, "base": {}}, "base"))
        yield Case(
            "ties / base listed with a weight",
            self.config("ties", {"base": {"weight": 9.0, "density": 0.1}, **_W}, "base", density=0.5),
        )
        yield Case("linear / base_model not listed", self.config("linear", _PAIR, "base", weight=0.6))
        yield Case("linear / base_model listed", self.config("linear", {**_PAIR, "base": {"weight": 1.2}}, "base"))
        yield Case("karcher / base_model listed", self.config("karcher", {"one": {}, "base": {}}, "base"))
        yield Case("ties / the base is a fine-tune", self.config("ties", _PAIR, "three", density=0.4))
        yield Case("task_arithmetic / the base alone", self.config("task_arithmetic", {"base": {}}, "base"))

    def task_vectors(self) -> Iterator[Case]:
        """The deterministic methods of the family of task arithmetic."""
        thirds = {"one": 0.3, "two": 0.5, "three": 1.0}
        gammas = {"one": 0.01, "two": 0.05, "three": 0.02}
        plain = ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
        for method in (*plain, "dare_linear", "dare_ties", "della_linear", "della"):
            shared = {"density": 1.0} if method.startswith(("dare", "della")) else {"density": 0.3}
            for normalize in (False, True):
                flag = str(normalize).lower()
                config = self.config(method, _W, "base", normalize=normalize, **shared)
                yield Case(f"{method} / normalize: {flag}, density {shared['density']:g}", config)
                config = self.config(method, _W, "base", normalize=normalize, **shared, **{"lambda": 0.7})
                yield Case(f"{method} / normalize: {flag}, lambda 0.7", config)
            if method != "task_arithmetic":
                yield Case(f"{method} / density 0", self.config(method, _W, "base", density=0.0))
        for method in plain[1:]:
            yield Case(f"{method} / as it comes", self.config(method, _W, "base"))
            for family in ("plain", "tied", "biased", "wide"):
                config = self.config(method, _with(_W, density=thirds), "base", family=family)
                yield Case(f"{method} / density of each, {family}", config)
            config = self.config(method, _with(_W, density=thirds), "base", rescale=True)
            yield Case(f"{method} / rescale: true", config)
        for method in ("breadcrumbs", "breadcrumbs_ties"):
            models = _with(_W, density=thirds, gamma=gammas)
            yield Case(f"{method} / gamma of each", self.config(method, models, "base"))
            yield Case(
                f"{method} / gamma larger than 1 - density", self.config(method, _PAIR, "base", density=0.8, gamma=0.4)
            )
        below = {"one": {"weight": -0.5}, "two": {"weight": 0.8}, "three": {"weight": 0.4}}
        yield Case("ties / weight below zero", self.config("ties", below, "base", density=0.5))
        yield Case(
            "ties / weight 0",
            self.config("ties", {"one": {"weight": 0.0}, "two": {"weight": 0.8}}, "base", density=0.5),
        )
        yield Case("ties / lambda below zero", self.config("ties", _W, "base", density=0.5, **{"lambda": -0.5}))
        yield Case("ties / int8_mask", self.config("ties", _W, "base", density=0.5, int8_mask=True))
        zero = {"one": {"weight": 0.1}, "two": {"weight": 0.2}, "three": {"weight": -0.3}}
        yield Case("task_arithmetic / weights of sum 0", self.config("task_arithmetic", zero, "base", normalize=True))

    def selective(self) -> Iterator[Case]:
        none: dict[str, Values] = {"one": {}, "two": {}, "three": {}}
        for share in (1.0, 0.4, 0.1, 0.0):
            yield Case(f"sce / select_topk {share:g}", self.config("sce", none, "base", select_topk=share))
        yield Case("sce / one model", self.config("sce", {"one": {}}, "base", select_topk=0.5))
        yield Case("sce / biases", self.config("sce", none, "base", family="biased", select_topk=0.4))
        yield Case("sce / tied", self.config("sce", none, "base", family="tied", select_topk=0.4))
        for family in ("plain", "biased"):
            yield Case(f"arcee_fusion / {family}", self.config("arcee_fusion", {"one": {}}, "base", family=family))
            yield Case(f"nearswap / {family}", self.config("nearswap", {"one": {}}, "base", family=family, t=0.003))
            yield Case(f"ram / {family}", self.config("ram", none, "base", family=family))
            yield Case(f"ramplus_tl / {family}", self.config("ramplus_tl", none, "base", family=family))
        yield Case("nearswap / t: 0", self.config("nearswap", {"one": {}}, "base", t=0.0))
        yield Case("ramplus_tl / r and alpha", self.config("ramplus_tl", none, "base", r=0.5, alpha=0.6))
        yield Case("ram / one model", self.config("ram", {"two": {}}, "base"))

    # ---- what can be said of a value, a layer and a model ------------------------------------------------------------

    def values(self) -> Iterator[Case]:
        """Gradients, filters, and which of several values applies."""
        gradient = {"one": {"weight": [0.0, 0.3, 1.0]}, "two": {"weight": [1.0, 0.5]}}
        yield Case("linear / gradients", self.config("linear", gradient))
        yield Case("slerp / filters with gradients", self.config("slerp", {"one": {}, "two": {}}, "one", t=_T_FILTERED))
        yield Case(
            "slerp / filters on embedding, norm and head",
            self.config("slerp", {"one": {}, "two": {}}, "one", t=[
                {"filter": "embed_tokens", "value": 0.1}, {"filter": "lm_head", "value": 0.9},
                {"filter": "model.norm", "value": 0.7}, {"filter": "input_layernorm", "value": [0.2, 0.6]},
                {"filter": "*", "value": [0.3, 0.8]},
            ]),
        )  # fmt: skip
        filtered = {
            "one": {"weight": [{"filter": "layers.1.", "value": 0.1}, {"value": 0.6}], "density": [0.2, 0.9]},
            "two": {
                "weight": [{"filter": "mlp", "value": [0.3, 0.9]}],
                "density": [{"filter": "q_proj", "value": 0.3}],
            },
        }
        yield Case(
            "ties / values of models, filters, fallbacks",
            self.config("ties", filtered, "base", weight=0.5, density=[0.4, 0.8], **{"lambda": [0.5, 1.2]}),
        )
        yield Case(
            "ties / normalize by filters and layers",
            self.config(
                "ties", _W, "base", density=0.5, normalize=[{"filter": "mlp", "value": False}, {"value": True}]
            ),
        )
        yield Case(
            "breadcrumbs / gradients of density and gamma",
            self.config("breadcrumbs", _W, "base", density=[0.3, 0.9], gamma=[0.0, 0.1, 0.02]),
        )
        yield Case(
            "task_arithmetic / lambda by filters",
            self.config(
                "task_arithmetic", _W, "base", **{"lambda": [{"filter": "v_proj", "value": 0.2}, {"value": 1.1}]}
            ),
        )
        yield Case(
            "nuslerp / gradients",
            self.config("nuslerp", {"one": {"weight": [0.0, 1.0]}, "two": {"weight": 0.5}}, "base"),
        )
        yield Case(
            "sce / select_topk by filters",
            self.config(
                "sce",
                {"one": {}, "two": {}},
                "base",
                select_topk=[{"filter": "mlp", "value": 0.2}, {"value": [0.5, 1]}],
            ),
        )
        yield Case("nearswap / t by layers", self.config("nearswap", {"one": {}}, "base", t=[0.001, 0.01]))
        yield Case(
            "linear / global weight", self.config("linear", {"one": {}, "two": {"weight": 0.2}}, weight=[0.4, 1.0])
        )
        biased = [{"filter": "bias", "value": 0.9}, {"value": 0.2}]
        yield Case(
            "linear / biases by filters",
            self.config("linear", {"one": {"weight": biased}, "two": {"weight": 0.5}}, family="biased"),
        )

    def slices(self) -> Iterator[Case]:
        none: Values = {}
        yield Case(
            "passthrough / stacked layers of two models",
            self.sliced("passthrough", self.piece(("one", 0, 3, none)), self.piece(("two", 1, 4, none))),
        )
        yield Case(
            "passthrough / interleaved",
            self.sliced(
                "passthrough", *(self.piece((("one", "two")[n % 2], n // 2, n // 2 + 1, none)) for n in range(8))
            ),
        )
        yield Case(
            "passthrough / a layer repeated, out of order",
            self.sliced(
                "passthrough", self.piece(("one", 2, 4, none)), self.piece(("one", 0, 1, none)),
                self.piece(("one", 0, 1, none)), self.piece(("one", 0, 1, none)),
            ),
        )  # fmt: skip
        yield Case("passthrough / fewer layers", self.sliced("passthrough", self.piece(("deep", 1, 3, none))))
        yield Case(
            "passthrough / models of different depth",
            self.sliced("passthrough", self.piece(("one", 0, 4, none)), self.piece(("deep", 2, 6, none))),
        )
        yield Case(
            "passthrough / deeper model first",
            self.sliced("passthrough", self.piece(("deep", 0, 5, none)), self.piece(("one", 2, 4, none))),
        )
        scale = {
            "scale": [{"filter": "o_proj", "value": 0.8}, {"filter": "down_proj", "value": [0.6, 0.9]}, {"value": 1.0}]
        }
        yield Case(
            "passthrough / scaled slices",
            self.sliced("passthrough", self.piece(("one", 0, 3, none)), self.piece(("two", 0, 4, scale))),
        )
        yield Case(
            "slerp / slices with own t",
            self.sliced(
                "slerp", self.piece(("one", 0, 2, none), ("two", 0, 2, none), t=[0.1, 0.9]),
                self.piece(("one", 2, 4, none), ("two", 2, 4, none)), base="one", t=0.5,
            ),
        )  # fmt: skip
        yield Case(
            "slerp / other layers of each model",
            self.sliced(
                "slerp", self.piece(("deep", 1, 4, none), ("one", 0, 3, none)),
                self.piece(("one", 1, 3, none), ("deep", 4, 6, none), base="one"), base="deep", t=[0.2, 0.7],
            ),
        )  # fmt: skip
        tuned: list[tuple[str, int, int, Values]] = [
            ("base", 0, 2, none), ("one", 1, 3, {"weight": 0.6, "density": [0.3, 0.9]}), ("two", 2, 4, {"weight": 0.4}),
        ]  # fmt: skip
        yield Case(
            "ties / slices, layers and values of each",
            self.sliced("ties", self.piece(*tuned), self.piece(*tuned, density=0.2), base="base", density=0.5),
        )
        weighed: list[tuple[str, int, int, Values]] = [
            ("one", 0, 3, {"weight": [0.2, 0.8]}), ("two", 1, 4, {"weight": 0.5}), ("three", 0, 3, none),
        ]  # fmt: skip
        yield Case(
            "linear / slices, layers of each",
            self.sliced("linear", self.piece(*weighed), self.piece(("two", 3, 4, {"weight": 2.0})), weight=0.3),
        )
        yield Case(
            "task_arithmetic / base_model of each slice",
            self.sliced(
                "task_arithmetic", self.piece(("base", 0, 2, none), ("one", 0, 2, {"weight": 0.5}), base="base"),
                self.piece(("two", 2, 4, none), ("three", 2, 4, {"weight": 0.7})), base="two",
            ),
        )  # fmt: skip

    def references(self) -> Iterator[Case]:
        """Adapters, and the two ways to write a model."""
        adapted = self.model("base") + "+" + self.model("adapter")
        config = {"base_model": self.model("base"), "dtype": "float32"}
        entry = {"model": adapted, "parameters": {"weight": 0.7}}
        other = {"model": self.model("two"), "parameters": {"weight": 0.5}}
        yield Case(
            "passthrough / model+lora",
            {"merge_method": "passthrough", "models": [{"model": adapted}], "dtype": "float32"},
        )
        yield Case(
            "task_arithmetic / model+lora", config | {"merge_method": "task_arithmetic", "models": [entry, other]}
        )
        yield Case(
            "ties / model+lora",
            config | {"merge_method": "ties", "models": [entry, other], "parameters": {"density": 0.4}},
        )
        spelt = {"model": {"path": self.model("base")}, "lora": {"path": self.model("adapter")}}
        yield Case(
            "linear / model+lora as keys",
            {"merge_method": "linear", "models": [entry | {"model": spelt}, other], "dtype": "float32"},
        )

    def dtypes(self) -> Iterator[Case]:
        yield Case("linear / no dtype", {k: v for k, v in self.config("linear", _W).items() if k != "dtype"})
        for dtype in ("bfloat16", "float16"):
            config = self.config("linear", _W, out_dtype=dtype)
            yield Case(f"linear / out_dtype: {dtype}", config, tolerance=HALF)
            # mergekit rounds the sources to dtype, and computes in it.
            yield Case(f"linear / dtype: {dtype}", self.config("linear", _W, dtype=dtype), tolerance=2 * HALF)
        config = self.config("ties", _W, "base", out_dtype="bfloat16", density=0.5)
        yield Case("ties / out_dtype: bfloat16", config, tolerance=HALF)

    def vocabularies(self) -> Iterator[Case]:
        """Different tokenizers, padded tables and chat templates."""
        base, tuned, other = (self.model(name, "vocabulary") for name in ("base", "tuned", "other"))
        both: dict[str, Values] = {"base": {"weight": 0.6}, "tuned": {"weight": 0.7}}
        three: dict[str, Values] = {**both, "other": {"weight": 0.4}}

        def case(name: str, models: Mapping[str, Values], first: str | None = "base", **top: Any) -> Case:
            config = self.config(top.pop("merge_method", "linear"), models, first, family="vocabulary", **top)
            united = "union" in (top.get("tokenizer_source"), top.get("tokenizer", {}).get("source"))
            # A union with tokens of another tokenizer: mergekit matches these in every text before the base's own.
            return Case(name, config, cut_like=base if united and "other" in models else None)

        for source in ("union", "base"):
            yield case(f"tokenizer_source: {source} / added tokens", both, tokenizer_source=source)
            yield case(f"tokenizer_source: {source} / other tokens", three, tokenizer_source=source)
            yield case(f"tokenizer_source: {source} / no base_model", three, None, tokenizer_source=source)
        for source in (tuned, other):
            yield case(f"tokenizer_source: a model, {Path(source).name}", three, tokenizer_source=source)
        padded: dict[str, Values] = {"padded": {"weight": 0.5}, "base": {"weight": 0.6}}
        for source in ("union", "base"):
            yield case(f"tokenizer_source: {source} / padded rows", padded, "padded", tokenizer_source=source)
        yield case("tokenizer_source: union / ties", three, merge_method="ties", tokenizer_source="union", density=0.5)
        yield case("tokenizer: pad_to_multiple_of", three, tokenizer={"source": "union", "pad_to_multiple_of": 32})
        tokens = {
            "<|call|>": {"source": {"kind": "zero"}},
            "<|end|>": {"source": tuned, "force": True},
            "<|new|>": {"source": {"kind": "model_token", "model": base, "token": "</s>"}},
            "</s>": {"source": {"kind": "model_token", "model": other, "token_id": 5}, "force": True},
        }
        yield case("tokenizer: tokens", three, tokenizer={"source": "union", "tokens": tokens})
        for template in ("auto", "chatml", "alpaca", "llama3", "mistral", "exaone", _TEMPLATE):
            name = template if len(template) < 10 else "text"
            yield case(f"chat_template: {name}", both, tokenizer_source="union", chat_template=template)
        yield Case("chat_template: with no tokenizer_source", self.config("linear", _PAIR, chat_template="chatml"))

    def random(self) -> Iterator[Case]:
        """DARE and DELLA, compared by distribution."""

        def wide(method: str, models: Mapping[str, Values], **top: Any) -> Case:
            options = ", ".join(f"{key} {str(value).lower()}" for key, value in top.items())
            name = f"{method} / {len(models)} models{', ' + options if options else ''}"
            return Case(name, self.config(method, models, "base", family="wide", **top), "random")

        one = {"one": {"weight": 0.8}}
        for method in ("dare_linear", "della_linear"):
            yield wide(method, one, density=0.3)
            yield wide(method, one, density=0.7)
            yield wide(method, one, density=0.3, rescale=False)
        yield wide("della_linear", one, density=0.5, epsilon=0.4)
        yield wide("della_linear", one, density=0.5, epsilon=0.0)
        for method in ("dare_linear", "dare_ties", "della_linear", "della"):
            yield wide(method, _W, density=0.3)
            yield wide(method, _W, density=0.6, normalize=method != "della")
            yield wide(method, _W, density=0.5, **{"lambda": 0.7})
        yield wide("dare_ties", _with(_W, density={"one": 0.3, "two": 0.0, "three": 1.0}))
        yield wide("della", _with(_W, epsilon={"one": 0.1, "two": 0.2, "three": 0.05}), density=0.4)
        yield Case(
            "dare_ties / gradients and filters",
            self.config(
                "dare_ties",
                {"one": {"weight": [0.2, 0.9]}, "two": {"weight": [{"filter": "mlp", "value": 0.9}, {"value": 0.3}]}},
                "base",
                family="wide",
                density=[0.3, 0.8],
            ),
            "random",
        )


_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
