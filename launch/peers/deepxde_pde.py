"""DeepXDE's side of `launch.bench_pde`: one training run after the other, advanced by so many seconds a request.

Runs in an environment of its own (`make peer-deepxde`) and imports nothing else of ours. The backend is what
DDE_BACKEND says, jax or pytorch. The clock runs while DeepXDE trains: not while it compiles, and not while the network
is judged.
"""

import json
import math
import os
import time

import deepxde as dde
import numpy as np
import poisson
from answering import answer_requests
from deepxde.backend import backend_name

if backend_name == "jax":
    import jax
    import jax.numpy as jnp

    sin = jnp.sin
else:
    import torch

    sin = torch.sin

# Seconds of training between two looks at the error.
_LOOK_S = 0.1


class Watch(dde.callbacks.Callback):
    """The clock, and what it shows when: rows of (seconds, centred error). Stops the training at `until`, or at the
    target."""

    def __init__(self, points, values):
        super().__init__()
        self.points, self.values = points, values
        self.restart()
        self.every, self.until, self.target = 1, math.inf, 0.0

    def restart(self):
        self.seconds, self.cpu_s, self.rows, self.epochs, self.mark = 0.0, 0.0, [], 0, None
        self.points_used = []

    def on_epoch_begin(self):
        if self.mark is None:
            self.mark = time.perf_counter(), time.process_time()

    def on_epoch_end(self):
        self.epochs += 1
        # DeepXDE remembers the boundary's values by the identity of its points: none may be freed and its place reused.
        if not self.points_used or self.points_used[-1] is not self.model.data.train_x:
            self.points_used.append(self.model.data.train_x)
        if self.epochs % self.every == 0:
            self.look()

    def untimed(self, function):
        """The function, during which the clock stands still."""

        def run(*arguments, **options):
            before = time.perf_counter(), time.process_time()
            function(*arguments, **options)
            if self.mark is not None:
                now = time.perf_counter(), time.process_time()
                self.mark = tuple(m + b - a for m, a, b in zip(self.mark, before, now))

        return run

    def look(self):
        if self.mark is None:
            return
        if backend_name == "jax":
            jax.block_until_ready(self.model.params)
        self.seconds += time.perf_counter() - self.mark[0]
        self.cpu_s += time.process_time() - self.mark[1]
        self.mark = None
        error = self.error()
        self.rows.append((self.seconds, error))
        if self.seconds >= self.until or not error > self.target:
            self.model.stop_training = True

    def error(self):
        # Not `predict`: it would take the callbacks of the run away.
        return poisson.centred_error(self.model._outputs(False, self.points), self.values)


class Peer:
    def load(self, threads: int) -> dict:
        versions = {"deepxde": dde.__version__, backend_name: (jax if backend_name == "jax" else torch).__version__}
        if backend_name == "jax":
            return {"versions": versions, "backend": backend_name, "platform": jax.default_backend()}
        torch.set_num_threads(threads)
        return {"versions": versions, "backend": backend_name, "platform": torch.get_default_device().type}

    def begin(self, dim: int, held_out: str, seed: int, width: int, depth: int, mode: dict) -> dict:
        """A fresh network and its training points, compiled; nothing is trained yet.

        `held_out`: a file of points `x` and the exact `value` there. `mode`: `inside` and `boundary` (numbers of
        points), `distribution`, `weight` of the boundary, `resample` (iterations between new points; 0 keeps them),
        `autodiff` (reverse or forward), `lbfgs_after_s` (None: never).
        """
        with np.load(held_out) as file:
            points, values = file["x"], file["value"]
        gap = float(np.abs(poisson.exact(points)[:, 0] - values).max())
        if not gap < 1e-4 * max(1.0, float(np.abs(values).max())):
            raise ValueError(f"exact solutions differ by {gap:.3g} on the held-out points")
        begin = time.perf_counter()
        self.dim, self.seed, self.sizes, self.mode = dim, seed, [dim] + [width] * (depth - 1) + [1], mode
        self.watch = Watch(points, values)
        self._build()
        self.watch.every = self._pace()
        self._start_again()
        self.watch.restart()
        self.callbacks = [self.watch]  # the last one: what the others do is on the clock
        if mode["resample"]:
            # On jax those of the boundary stay: their values are constants of what was compiled.
            edge = backend_name == "pytorch"
            self.callbacks.insert(0, dde.callbacks.PDEPointResampler(period=mode["resample"], bc_points=edge))
        self.lbfgs, self.ended = False, False
        return {
            "compile_s": time.perf_counter() - begin,
            "parameters": sum(kernel.size + bias.size for kernel, bias in self._layers()),
            "every": self.watch.every,
            "c_l2": self.watch.error(),
        }

    def advance(self, until_s: float, target: float) -> dict:
        """Trains until the clock shows `until_s` or the error is at most `target`. What it has seen since the last
        request; `ended` where training ended by itself."""
        watch, after = self.watch, self.mode["lbfgs_after_s"]
        seen = len(watch.rows)
        watch.target = target
        while not self.ended and watch.seconds < until_s:
            if after is not None and watch.seconds >= after and not self.lbfgs:
                self._to_lbfgs()
            watch.until = until_s if after is None or self.lbfgs else min(until_s, max(after, 1e-9))
            self.model.train(iterations=10**9, display_every=10**9, callbacks=self.callbacks)
            if self.lbfgs and not self.model.stop_training:
                watch.look()  # its last iterations
                self.ended = True
            self.ended |= not watch.rows[-1][1] > target or not math.isfinite(watch.rows[-1][1])
        return {
            "rows": watch.rows[seen:],
            "seconds": watch.seconds,
            "cpu_s": watch.cpu_s,
            "iterations": self._iterations(),
            "ended": self.ended,
        }

    def losses(self) -> dict:
        """What it minimises now: the weighted terms (equation, boundary), its points (those of the boundary's term
        first) and its network, layer by layer."""
        data = self.model.data
        x, y, aux = data.train_next_batch()
        return {
            "terms": np.ravel(self.model._outputs_losses(True, x, y, aux)[1]).tolist(),
            "points": np.asarray(x).tolist(),
            "of_boundary": int(sum(data.num_bcs)),
            "layers": [[kernel.tolist(), bias.tolist()] for kernel, bias in self._layers()],
        }

    def _build(self) -> None:
        dde.config.set_random_seed(self.seed)
        mode = self.mode
        dde.config.set_default_autodiff(mode["autodiff"])
        cube = dde.geometry.Hypercube([0.0] * self.dim, [1.0] * self.dim)
        edge = dde.icbc.DirichletBC(cube, lambda x: poisson.exact(x), lambda x, on_boundary: on_boundary)
        data = dde.data.PDE(
            cube,
            self._equation,
            edge,
            num_domain=mode["inside"],
            num_boundary=mode["boundary"],
            train_distribution=mode["distribution"],
        )
        net = dde.nn.FNN(self.sizes, "tanh", "Glorot uniform")
        self.model = dde.Model(data, net)
        self.watch.set_model(self.model)
        self.model.compile("adam", lr=1e-3, loss_weights=self._weights())

    def _iterations(self) -> int:
        if not self.lbfgs:
            return int(self.model.train_state.step)
        # DeepXDE counts those of earlier requests again.
        return self.adam_iterations + int(self.model.opt.state_dict()["state"][0]["n_iter"])

    def _weights(self) -> list | None:
        return None if self.mode["weight"] == 1.0 else [1.0, self.mode["weight"]]

    def _equation(self, x, y):
        second = [dde.grad.hessian(y, x, i=k, j=k) for k in range(self.dim)]
        if isinstance(second[0], tuple):  # values and a function
            second = [values for values, _ in second]
        return poisson.residual(x, sum(second), sin)

    def _pace(self) -> int:
        """Compiles by training a little; iterations that take `_LOOK_S`."""
        self._start = (self.model.params, self.model.opt_state) if backend_name == "jax" else None
        self.model.train(iterations=2, display_every=10**9, callbacks=[self.watch])
        self.watch.restart()
        self.model.train(iterations=5, display_every=10**9, callbacks=[self.watch])
        return max(1, min(200, round(_LOOK_S * 5 / self.watch.seconds)))

    def _start_again(self) -> None:
        """The first parameters; of jax without compiling once more."""
        if self._start is None:
            self._build()
            return
        self.model.params, self.model.opt_state = self._start
        self.model.net.params, self.model.external_trainable_variables = self.model.params
        self.model.train_state = dde.model.TrainState()

    def _to_lbfgs(self) -> None:
        self.lbfgs, self.adam_iterations = True, int(self.model.train_state.step)
        dde.optimizers.set_LBFGS_options(maxiter=10**6)
        # Of one call of the optimizer, after which the error is looked at: it keeps its memory between calls.
        dde.optimizers.LBFGS_options["iter_per_step"] = 10
        dde.optimizers.LBFGS_options["fun_per_step"] = 13
        self.watch.every = 1
        self.model._test = self.watch.untimed(self.model._test)  # after each call of it
        self.model.compile("L-BFGS", loss_weights=self._weights())

    def _layers(self) -> list:
        """(inputs, outputs) weights and (outputs,) biases."""
        if backend_name == "jax":
            found = self.model.net.params["params"]
            return [(np.asarray(found[k]["kernel"]), np.asarray(found[k]["bias"])) for k in sorted(found)]
        linears = self.model.net.linears
        return [(m.weight.detach().numpy().T, m.bias.detach().numpy()) for m in linears]


if __name__ == "__main__":
    if os.environ.get("DDE_BACKEND") not in ("jax", "pytorch"):
        raise SystemExit(f"DDE_BACKEND={json.dumps(os.environ.get('DDE_BACKEND'))}: expected jax or pytorch")
    answer_requests(Peer())
