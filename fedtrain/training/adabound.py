"""AdaBound: Adam whose step sizes are clipped to bounds that close in on those of SGD.

References:
    Luo, Xiong, Liu, Sun, "Adaptive Gradient Methods with Dynamic Bound of Learning Rate", ICLR 2019. Algorithm 2, with
    the bias correction and the bounds of the authors' code, where lr_0 is the rate that a schedule starts from:
        m_t = beta_1 m_{t-1} + (1 - beta_1) g_t,    v_t = beta_2 v_{t-1} + (1 - beta_2) g_t^2
        f_t = final_lr lr_t / lr_0
        eta_t = clip(lr_t sqrt(1 - beta_2^t) / (1 - beta_1^t) / (sqrt(v_t) + eps),
                     f_t (1 - 1 / (gamma t + 1)), f_t (1 + 1 / (gamma t)))
        x_t = x_{t-1} - eta_t m_t
    AMSBound takes for v_t the largest so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

__all__ = ["AdaBound"]


class AdaBound(torch.optim.Optimizer):
    """AdaBound, or AMSBound.

    Args:
        params: what to change, as for any optimiser of torch.
        lr: learning rate of the beginning, as Adam's; bounds of a group are scaled by its rate over this.
        betas: decay of the first and second moment.
        final_lr: learning rate of the end, as SGD's.
        gamma: how fast the bounds close in, per step.
        eps: added to the denominator.
        weight_decay: L2 penalty added to the gradient.
        amsbound: take the largest second moment so far.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsbound: bool = False,
    ) -> None:
        if not (lr > 0 and final_lr > 0 and eps > 0 and weight_decay >= 0):
            raise ValueError("lr, final_lr and eps must be greater than 0, and weight_decay at least 0")
        if not (0 < gamma < 1 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError("gamma must be between 0 and 1, and betas at least 0 and below 1")
        settings = {"betas": betas, "final_lr": final_lr, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, "amsbound": amsbound, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients; a closure is not called."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._change(param, param.grad, group)

    def _change(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            if group["amsbound"]:
                state["max_exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        number, (beta1, beta2) = float(state["step"]), group["betas"]
        if group["weight_decay"]:
            gradient = gradient.add(param, alpha=group["weight_decay"])
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if group["amsbound"]:
            second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
        rate = group["lr"] * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
        final, pace = group["final_lr"] * group["lr"] / self.defaults["lr"], group["gamma"] * number
        rates = (rate / (second.sqrt() + group["eps"])).clamp_(final * (1 - 1 / (pace + 1)), final * (1 + 1 / pace))
        param.sub_(rates.mul_(state["exp_avg"]))
