"""What examples/libmtl.py uses of LibMTL, written anew from LibMTL's documentation, for machines without LibMTL.

`modules` gives the modules of the package. Their classes and methods have LibMTL's names and arguments.
"""

import argparse
import random
import types

import torch
from torch import nn


class AbsWeighting(nn.Module):
    def init_param(self):
        """Add the weighting's own parameters to the model."""

    def backward(self, losses, **kwargs):
        raise NotImplementedError


class EW(AbsWeighting):
    """Equal weights."""

    def backward(self, losses, **kwargs):
        losses.sum().backward()


class UW(AbsWeighting):
    """Weights that are learnt from the uncertainty of each task."""

    def init_param(self):
        self.loss_scale = nn.Parameter(torch.full((self.task_num,), -0.5))

    def backward(self, losses, **kwargs):
        (losses / (2 * self.loss_scale.exp()) + self.loss_scale / 2).sum().backward()


class PCGrad(AbsWeighting):
    """Of gradients that point against each other, each loses what points against another. It does one backward pass for
    each task, and then writes the gradients of the encoder."""

    def backward(self, losses, **kwargs):
        gradients = []
        for number, loss in enumerate(losses):
            loss.backward(retain_graph=number < len(losses) - 1)
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in self.get_share_params()]))
            self.zero_grad_share_params()
        total = torch.zeros_like(gradients[0])
        for gradient in gradients:
            own, order = gradient.clone(), list(range(len(gradients)))
            random.shuffle(order)
            for other in (gradients[number] for number in order):
                product = own @ other
                if product < 0:
                    own -= product / other.square().sum() * other
            total += own
        for parameter in self.get_share_params():
            now, total = total[: parameter.numel()], total[parameter.numel() :]
            parameter.grad.copy_(now.view_as(parameter))


class HPS(nn.Module):
    """Hard parameter sharing: one encoder, and a decoder for each task."""

    def __init__(self, task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs):
        super().__init__()
        self.task_name, self.task_num, self.decoders = task_name, len(task_name), decoders
        self.encoder = encoder_class()

    def forward(self, inputs, task_name=None):
        found = self.encoder(inputs)
        of_tasks = found if isinstance(found, list) else [found] * self.task_num
        return {task: self.decoders[task](one) for task, one in zip(self.task_name, of_tasks, strict=True)}

    def get_share_params(self):
        return self.encoder.parameters()

    def zero_grad_share_params(self):
        self.encoder.zero_grad()


class CELoss:
    def compute_loss(self, pred, gt):
        return nn.functional.cross_entropy(pred, gt)


class AccMetric:
    def __init__(self):
        self.record, self.bs = [], []

    def update_fun(self, pred, gt):
        self.record.append((pred.argmax(-1) == gt).sum().item())
        self.bs.append(len(gt))

    def score_fun(self):
        return [sum(self.record) / sum(self.bs)]


class Trainer(nn.Module):
    def __init__(
        self, task_dict, weighting, architecture, encoder_class, decoders, rep_grad, multi_input, optim_param,
        scheduler_param, **kwargs,
    ):  # fmt: skip
        super().__init__()
        self.device = torch.device("cuda:0")
        self.task_dict, self.task_name, self.kwargs = task_dict, list(task_dict), kwargs
        made = type("MTLmodel", (architecture, weighting), {})
        how = (self.task_name, encoder_class, decoders, rep_grad, multi_input, self.device)
        self.model = made(*how, **kwargs["arch_args"]).to(self.device)
        self.model.init_param()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=optim_param["lr"])

    def train(self, train_dataloaders, test_dataloaders, epochs):
        for _ in range(epochs):
            self.model.train()
            batches = iter(train_dataloaders)
            for _ in range(len(train_dataloaders)):
                data, labels = next(batches)
                outputs = self.model(data.to(self.device))
                losses = [self.task_dict[t]["loss_fn"].compute_loss(outputs[t], labels[t]) for t in self.task_name]
                self.optimizer.zero_grad()
                self.model.backward(torch.stack(losses), **self.kwargs["weight_args"])
                self.optimizer.step()


def prepare_args(params):
    return {"weight_args": {}, "arch_args": {}}, {"optim": "adam", "lr": params.lr}, None


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weighting", default="EW")
    parser.add_argument("--rep_grad", action="store_true")
    parser.add_argument("--multi_input", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--weight_decay", type=float, default=1e-5)
    return parser


def modules():
    """The modules by name."""
    contents = {
        "architecture": {"HPS": HPS},
        "weighting": {"AbsWeighting": AbsWeighting, "EW": EW, "UW": UW, "PCGrad": PCGrad},
        "loss": {"CELoss": CELoss},
        "metrics": {"AccMetric": AccMetric},
        "config": {"LibMTL_args": options(), "prepare_args": prepare_args},
    }
    library = types.ModuleType("LibMTL")
    library.Trainer = Trainer
    for name, things in contents.items():
        module = types.ModuleType(f"LibMTL.{name}")
        vars(module).update(things, __all__=list(things))
        setattr(library, name, module)
    return {"LibMTL": library, **{f"LibMTL.{name}": getattr(library, name) for name in contents}}
