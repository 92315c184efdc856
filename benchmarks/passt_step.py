"""Time and memory of a PaSST training step, beside straightforward implementations of the same work in the same run.

  python benchmarks/passt_step.py                                              one CPU core, 4 clips of 1 second
  python benchmarks/passt_step.py --seconds 10 --batch_size 1
  python benchmarks/passt_step.py --torch_device cuda --batch_size 80 --precision bf16

The straightforward network has the same weights and draws and the same precision. It projects all patches with a
strided convolution, adds the embeddings, then drops patches; every block computes every token; attention is product,
softmax and product ("explicit"), or PyTorch's fused attention ("fused"). A step is a forward and a backward pass of
the cross-entropy. The sides are timed in turn, round by round, so that a busy machine slows all; the table shows the
median over the rounds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.machine import Precision
from helpers.memory import keep_freed_memory
from models.passt import Passt, PasstConfig

FRAMES_PER_SECOND = 100


class PlainPasst(Passt):
    """The published order of operations, written out."""

    fused_attention = False

    def features(self, log_mel: Tensor) -> Tensor:
        x = self.patch_embed.proj(log_mel)  # (batch, width, row, column)
        n_columns = x.shape[3]
        offset, kept = self.draw_patches(n_columns, log_mel.device)
        first = 0 if offset is None else int(offset)
        x = x + self.time_new_pos_embed[..., first : first + n_columns] + self.freq_new_pos_embed
        x = x.flatten(2).transpose(1, 2)  # (batch, patch, width)
        if kept is not None:
            x = x[:, kept]
        cls = (self.cls_token + self.new_pos_embed[:, :1]).expand(len(x), -1, -1)
        dist = (self.dist_token + self.new_pos_embed[:, 1:]).expand(len(x), -1, -1)
        x = torch.cat([cls, dist, x], dim=1)
        for block in self.blocks:
            x = x + self.attention(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        x = self.norm(x)
        return (x[:, 0] + x[:, 1]) / 2

    def attention(self, attn: torch.nn.Module, x: Tensor) -> Tensor:
        n_batch, n_tokens, width = x.shape
        qkv = attn.qkv(x).reshape(n_batch, n_tokens, 3, attn.n_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv  # each (batch, head, token, width of a head)
        if self.fused_attention:
            y = F.scaled_dot_product_attention(query, key, value)
        else:
            y = ((query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5).softmax(dim=-1) @ value
        return attn.proj(y.transpose(1, 2).reshape(n_batch, n_tokens, width))


class FusedPlainPasst(PlainPasst):
    fused_attention = True


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a clip")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--s_patchout_f", type=int, default=6, help="rows of patches dropped")
    parser.add_argument("--grad_checkpointing", action="store_true", help="ours only: recompute blocks, less memory")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--torch_device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=12, help="blocks; fewer for a quick look")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # for all sides, as the training scripts do
    torch.manual_seed(0)
    device, n = torch.device(args.torch_device), args.batch_size
    autocast = Precision(args.precision, device).autocast

    options = {"s_patchout_f": args.s_patchout_f, "depth": args.depth}
    ours = Passt(PasstConfig(**options, grad_checkpointing=args.grad_checkpointing)).to(device)
    models = {"plain, explicit": PlainPasst(PasstConfig(**options)), "plain, fused": FusedPlainPasst(ours.config)}
    for model in models.values():
        model.to(device).load_state_dict(ours.state_dict())
    models["ours"] = ours
    log_mel = torch.randn(n, 1, 128, round(args.seconds * FRAMES_PER_SECOND), device=device)
    target = torch.arange(n, device=device) % 10

    def step(name: str) -> tuple[float, float, Tensor]:
        """Milliseconds, peak memory in MB beside what was there (CUDA only), and the logits."""
        model = models[name]
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)  # the same draws for all
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        with autocast():
            logits = model(log_mel)
            loss = F.cross_entropy(logits.float(), target)
        loss.backward()
        peak = 0
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        return 1000 * (time.perf_counter() - started), peak / 1e6, logits.detach()

    outputs = {name: step(name)[2] for name in models}  # also warms up
    tolerance = 1e-4 if args.precision == "fp32" else 5e-2
    for name, logits in outputs.items():
        torch.testing.assert_close(logits, outputs["plain, explicit"], rtol=tolerance, atol=tolerance, msg=name)
    rounds = [{name: step(name)[:2] for name in models} for _ in range(args.rounds)]

    print(
        f"{args.threads} thread(s), {device}, {args.precision}, batch {n} of {args.seconds:g} s, {args.rounds} rounds"
    )
    print(f"{'network':<18}{'ms per step':>12}{'ms per clip':>12}{'ratio':>8}{'peak MB':>10}")
    results = {}
    for name in models:
        milliseconds = statistics.median(times[name][0] for times in rounds)
        ratio = statistics.median(times[name][0] / times["plain, explicit"][0] for times in rounds)
        peak = max(times[name][1] for times in rounds)
        memory = f"{peak:>10.0f}" if device.type == "cuda" else f"{'-':>10}"
        print(f"{name:<18}{milliseconds:>12.1f}{milliseconds / n:>12.2f}{ratio:>8.2f}{memory}")
        results[name] = milliseconds
    return results


if __name__ == "__main__":
    main()
