"""Latent modality structures as modules: the base loss, the head of independent features, and all of it together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..arguments.checks import (
    Refused,
    check_backend,
    check_count,
    check_dense,
    check_distribution,
    check_flag,
    check_generator,
    check_number,
    check_scale,
    check_workspace,
    shown,
)
from ..arguments.reduction import DEFAULT_WORKSPACE_BYTES
from ..arguments.temperature import scale_of
from ..distributed.group import Ranks, check_group, ranks_of, told
from ..distributed.sums import Sums
from .bridge import brownian_bridge, check_time
from .geometry import geometric_consistency
from .multimodal import multimodal_contrastive
from .separation import feature_separation

__all__ = ["LatentStructureLoss", "MultimodalContrastiveLoss", "SeparationHead"]


class MultimodalContrastiveLoss(nn.Module):
    """The four-way contrastive loss; see :func:`contrastive_kernels.multimodal_contrastive`.

    Parameters
    ----------
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.MultimodalContrastiveLoss()
    >>> round(loss(torch.eye(4), torch.eye(4), 5.0, torch.eye(4), torch.eye(4)).item(), 5)
    0.02001
    """

    def __init__(
        self,
        *,
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
        group: Any | None = "auto",
        gradients: str = "average",
        strategy: str = "auto",
        uneven: bool = False,
    ) -> None:
        super().__init__()
        check_distribution(gradients, strategy, uneven)
        self.options: dict[str, Any] = {
            "normalize": check_flag(normalize, "normalize"),
            "backend": check_backend(backend) or None,
            "workspace_bytes": check_workspace(workspace_bytes),
            "group": check_group(group),
            "gradients": gradients,
            "strategy": strategy,
            "uneven": uneven,
        }

    def extra_repr(self) -> str:
        """The options, as they print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor | None = None,
        image_aug: Tensor | None = None,
        text_aug: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """Matching rows [N, D]; without views, what is left is CLIP's loss."""
        views = image_aug, text_aug
        return multimodal_contrastive(image, text, *views, logit_scale, temperature=temperature, **self.options)


class SeparationHead(nn.Module):
    """The projection that gives a tower its independent features: a linear map, or one hidden layer, to the sphere.

    Parameters
    ----------
    in_features : int
        Width of the tower's features, those that its own projection sees.
    out_features : int
        Width D of the result, that of the shared features.
    hidden_features : int, optional
        Width of a hidden layer with GELU; None: a linear map.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> head = ck.SeparationHead(32, 8, hidden_features=16)
    >>> head(torch.randn(5, 32)).norm(dim=1).round(decimals=4)
    tensor([1., 1., 1., 1., 1.], ...)
    """

    def __init__(self, in_features: int, out_features: int, hidden_features: int | None = None) -> None:
        super().__init__()
        check_count(in_features, "in_features")
        check_count(out_features, "out_features")
        if hidden_features is not None:
            check_count(hidden_features, "hidden_features")
        if hidden_features is None:
            self.layers = nn.Sequential(nn.Linear(in_features, out_features))
        else:
            self.layers = nn.Sequential(
                nn.Linear(in_features, hidden_features), nn.GELU(), nn.Linear(hidden_features, out_features)
            )

    def forward(self, features: Tensor) -> Tensor:
        """[..., in_features] to unit-norm [..., out_features]."""
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a tensor [..., in_features]; got {type(features).__name__}")
        check_dense(features, "features")
        first: Any = self.layers[0].weight
        if not features.is_floating_point():
            raise TypeError(f"features: expected a floating-point tensor; got {features.dtype}")
        if features.dim() == 0 or features.shape[-1] != first.shape[1]:
            raise ValueError(f"features: expected shape [..., {first.shape[1]}]; got {list(features.shape)}")
        if features.device != first.device:
            raise ValueError(f"features: expected device {first.device}; got {features.device}")
        return nn.functional.normalize(self.layers(features), dim=-1)


#: What an option of a regulariser is checked by.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    name: partial(check_number, name=name, positive=False)
    for name in ("orthogonality", "contrast", "uniformity", "cross", "intra", "augmented")
} | {
    "t": check_time,
    "generator": check_generator,
    "normalize": partial(check_flag, name="normalize"),
    "backend": check_backend,
    "workspace_bytes": check_workspace,
}

_GIVEN_BY_THE_MODULE = ("temperature", "return_terms", "group", "gradients", "strategy", "uneven")


def _options(given: Any, name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword arguments that a function has beside its features."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a dict or None; got {type(given).__name__}")
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN_BY_THE_MODULE]
    for key, value in (given or {}).items():
        if key not in known:
            raise ValueError(f"{name}: expected some of {', '.join(known)}; got {shown(key)}")
        try:
            _CHECKS[key](value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return dict(given or {})


class LatentStructureLoss(nn.Module):
    """A contrastive base loss and up to three regularisers of the latent space, each with its weight.

    Parameters
    ----------
    base : callable, optional
        Called as ``base(image, text, logit_scale)``: any module or function of two feature matrices whose result is a
        scalar, such as :class:`contrastive_kernels.ClipLoss`. A :class:`MultimodalContrastiveLoss`, the default, gets
        the augmented views as well.
    separation : float
        Weight of :func:`contrastive_kernels.feature_separation`; 0: left out.
    bridge : float
        Weight of :func:`contrastive_kernels.brownian_bridge`; 0: left out.
    geometry : float
        Weight of :func:`contrastive_kernels.geometric_consistency`; 0: left out.
    separation_options, bridge_options, geometry_options : dict, optional
        Further keyword arguments of the three functions, such as ``{"t": "sampled"}``.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`, of the regularisers and the default base; by default all ranks of
        the default process group, if there is one. A base that is given has its own.

    Notes
    -----
    The paper prints no weights. CyCLIP's, for what is geometry here, is 0.25.

    All terms but the bridge compare the samples of a batch with one another: those of all ranks.

    References
    ----------
    Q. Jiang et al., "Understanding and constructing latent modality structures in multi-modal representation
    learning", CVPR 2023.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.LatentStructureLoss(bridge=0.1, geometry=0.25)
    >>> image, text, view = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(3))
    >>> sorted(loss(image, text, 10.0, image_aug=view))
    ['base', 'bridge', 'geometry', 'loss']
    """

    def __init__(
        self,
        base: Callable[..., Tensor] | None = None,
        separation: float = 0.0,
        bridge: float = 0.0,
        geometry: float = 0.0,
        *,
        separation_options: dict[str, Any] | None = None,
        bridge_options: dict[str, Any] | None = None,
        geometry_options: dict[str, Any] | None = None,
        group: Any | None = "auto",
        gradients: str = "average",
        strategy: str = "auto",
        uneven: bool = False,
    ) -> None:
        super().__init__()
        check_distribution(gradients, strategy, uneven)
        self.over: dict[str, Any] = {
            "group": check_group(group), "gradients": gradients, "strategy": strategy, "uneven": uneven
        }  # fmt: skip
        if base is not None and not callable(base):
            raise TypeError(f"base: expected a loss module or None; got {type(base).__name__}")
        self.base = MultimodalContrastiveLoss(**self.over) if base is None else base
        weights = {"separation": separation, "bridge": bridge, "geometry": geometry}
        self.weights = {name: check_number(weight, name, positive=False) for name, weight in weights.items()}
        self.separation_options = _options(separation_options, "separation_options", feature_separation)
        self.bridge_options = _options(bridge_options, "bridge_options", brownian_bridge)
        self.geometry_options = _options(geometry_options, "geometry_options", geometric_consistency)

    def extra_repr(self) -> str:
        """The weights, as they print."""
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        image_aug: Tensor | None = None,
        text_aug: Tensor | None = None,
        image_independent: Tensor | None = None,
        text_independent: Tensor | None = None,
        image_independent_aug: Tensor | None = None,
        text_independent_aug: Tensor | None = None,
        independent_logit_scale: float | Tensor | None = None,
        independent_temperature: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its parts.

        Parameters
        ----------
        image, text : Tensor
            Shared features of matching rows [N, D], unit-norm.
        logit_scale : float or Tensor
            The inverse temperature.
        temperature : float or Tensor, optional
            1 / logit_scale, in its place: above 0. The base gets the scale.
        image_aug, text_aug : Tensor, optional
            The same of augmented views [N, D]; the bridge needs at least one of them.
        image_independent, text_independent : Tensor, optional
            Independent features [N, D], which separation needs.
        image_independent_aug, text_independent_aug : Tensor, optional
            The same of augmented views [N, D].
        independent_logit_scale : float or Tensor, optional
            The inverse temperature of separation's contrast. Default: the value of ``logit_scale``, without a gradient
            to it: telling independent features apart is another task, whose best temperature is not the towers'.
        independent_temperature : float or Tensor, optional
            1 / independent_logit_scale, in its place: above 0.

        Returns
        -------
        dict of Tensor
            "loss", to call ``backward`` on; and detached, before their weights: "base", "separation", "bridge",
            "geometry" and separation's terms "separation/orthogonality", "separation/contrast",
            "separation/uniformity", as far as they are there.

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit, and for features that a regulariser needs and that are not given.
        """
        logit_scale = scale_of(image, logit_scale, temperature)
        if isinstance(logit_scale, Refused):  # before a base of the user's gets it
            with told(self._ranks(), image):
                check_scale(image, logit_scale)
        if isinstance(self.base, MultimodalContrastiveLoss):
            base = self.base(image, text, logit_scale, image_aug, text_aug)
        else:
            base = self.base(image, text, logit_scale)
        if not isinstance(base, Tensor) or base.dim():
            raise TypeError(f"base: expected a module that returns a scalar tensor; got {type(base).__name__}")
        values = {"base": base}
        parts: dict[str, Tensor] = {}
        if self.weights["separation"]:
            own = independent_logit_scale, independent_temperature
            independent_logit_scale = scale_of(image, *own, prefix="independent_")
            if independent_logit_scale is None:
                independent_logit_scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
            with told(self._ranks(), image):
                if image_independent is None or text_independent is None:
                    raise ValueError("image_independent, text_independent: expected tensors [N, D]; got None")
                check_scale(image, independent_logit_scale, "independent_logit_scale")
            result = feature_separation(
                image, text, image_independent, text_independent, image_independent_aug, text_independent_aug,
                independent_logit_scale, return_terms=True, **self.separation_options, **self.over,
            )  # fmt: skip
            values["separation"], terms = result
            parts = {f"separation/{name}": value for name, value in terms.items()}
        if self.weights["bridge"]:
            values["bridge"] = self._bridge(image, text, image_aug, text_aug)
        if self.weights["geometry"]:
            over = {name: value for name, value in self.over.items() if name != "strategy"} | self.geometry_options
            values["geometry"] = geometric_consistency(image, text, image_aug, text_aug, **over)
        loss = base
        for name, value in values.items():
            if name != "base":
                loss = loss + self.weights[name] * value
        return {"loss": loss, **{name: value.detach() for name, value in values.items()}, **parts}

    def _ranks(self) -> Ranks | None:
        """The ranks whose rows make up a batch."""
        return ranks_of(**self.over)

    def _bridge(self, image: Tensor, text: Tensor, image_aug: Tensor | None, text_aug: Tensor | None) -> Tensor:
        """The bridge's mean over the samples of all ranks."""
        ranks = self._ranks()
        with told(ranks, image):
            own = brownian_bridge(image, text, image_aug, text_aug, **self.bridge_options)
        if ranks is None:
            return own
        return Sums.of(ranks, "brownian_bridge", image, Sums.differentiated(own)).mean(own * len(image))
