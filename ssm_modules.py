# --- 6. The layers: from a stream of tokens to the ops, and back ------------------------------------------------------

class RecurrentState:
    """The state of a recurrent layer for B sequences in step: the convolution's last inputs `conv` [B, channels, K − 1]
    and the layer's own `state` [B, …].

    A state of packed sequences (one of infer.py's, or a routed layer's) has the same names. `cu_seqlens`: where each
    begins and ends in x [1, N, C]; `ones`: whether each has one token there.
    """
    cu_seqlens, ones = None, False

    def __init__(self, conv, state):
        self.conv, self.state = conv, state

    def update(self, conv, state):
        self.conv, self.state = conv, state


class Mixer(nn.Module):
    """x [B, T, C] → [B, T, C]: project in, convolve, mix along time, gate, project out. What the layers below share.

    Each has `widths` (rows of `in_proj`: gate, what is convolved, the rest), and two calls of its own: `mix(x, rest,
    one, **state)`, its op after the convolution → (y, state), and `gated(y, gate)`.
    """

    def __init__(self, C, widths, K, state_shape, bias=False, conv_bias=True):
        super().__init__()
        self.widths, self.K, self.state_shape = widths, K, state_shape
        self.in_proj = nn.Linear(C, sum(widths), bias=bias)
        self.conv_weight = nn.Parameter(torch.zeros(widths[1], K))
        self.conv_bias = nn.Parameter(torch.zeros(widths[1])) if conv_bias else None

    def new_state(self, B):
        """The state before the first token, of B sequences."""
        w = self.conv_weight
        return RecurrentState(w.new_zeros(B, self.widths[1], self.K - 1),
                              torch.zeros(B, *self.state_shape, device=w.device))

    def forward(self, x, positions, state=None):
        shape = x.shape
        one = state is not None and (state.ones or shape[1] == 1 and state.cu_seqlens is None)
        gate, x, rest = self.in_proj(x.flatten(0, 1) if one else x).split(self.widths, dim=-1)
        w, bias = self.conv_weight.to(x.dtype), None if self.conv_bias is None else self.conv_bias.to(x.dtype)
        if state is None:
            y, _ = self.mix(causal_conv1d(x, w, bias)[0], rest, one)
        else:
            packed = {} if one else dict(cu_seqlens=state.cu_seqlens)
            x, conv = (causal_conv1d_step if one else causal_conv1d)(x, w, bias, state=state.conv, **packed)
            y, after = self.mix(x, rest, one, state=state.state, **packed)
            state.update(conv, after)
        return self.out_proj(self.gated(y, gate)).view(shape)

    def matrices(self):
        """Matrices for Muon, as (parameter, first row, last row): the parts of `in_proj` that mean something each."""
        ends = list(itertools.accumulate(self.parts))
        return [(self.in_proj.weight, end - rows, end) for rows, end in zip(self.parts, ends)] + [
            (self.out_proj.weight, 0, len(self.out_proj.weight))]

    def initialize(self, generator):
        """What is neither matrix nor gain: the convolution, and steps from 0.001 to 0.1 at decays from 1 to 16."""
        uniform = lambda w, low, high: torch.rand(w.shape, generator=generator) * (high - low) + low
        self.conv_weight.copy_(uniform(self.conv_weight, -1, 1) * self.K ** -0.5)
        dt = torch.exp(uniform(self.dt_bias, math.log(1e-3), math.log(0.1)))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))                # softplus makes it dt again
        self.A_log.copy_(torch.log(uniform(self.A_log, 1, 16)))


class Mamba(Mixer):
    """Mamba-1 (arXiv 2312.00752): inner width E, state size N a channel, Δ from R numbers a token."""

    def __init__(self, C, E=None, N=16, R=None, K=4, bias=False, conv_bias=True):
        E, R = E or 2 * C, R or -(-C // 16)
        super().__init__(C, (E, E, 0), K, (E, N), bias, conv_bias)
        self.parts, self.R, self.N = (E, E), R, N
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj, self.dt_bias = nn.Linear(R, E, bias=False), nn.Parameter(torch.zeros(E))
        self.A_log, self.D = nn.Parameter(torch.zeros(E, N)), nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, C, bias=bias)

    def mix(self, x, rest, one, **state):
        r, B, C = self.x_proj(x).split([self.R, self.N, self.N], dim=-1)
        dt = F.softplus(self.dt_proj(r).float() + self.dt_bias.float())
        op = selective_scan_step if one else selective_scan
        return op(x, dt, -torch.exp(self.A_log.float()), B, C, self.D, **state)

    def gated(self, y, gate):
        return swiglu(gate, y)

    def matrices(self):
        return super().matrices() + [(self.x_proj.weight, 0, self.R), (self.x_proj.weight, self.R, self.R + self.N),
                                     (self.x_proj.weight, self.R + self.N, self.R + 2 * self.N)]

    def initialize(self, generator):
        super().initialize(generator)
        self.dt_proj.weight.copy_((torch.rand(self.dt_proj.weight.shape, generator=generator) * 2 - 1) * self.R ** -0.5)
        self.A_log.copy_(torch.log(torch.arange(1.0, self.N + 1)).expand_as(self.A_log))                 # S4D-real


class Mamba2(Mixer):
    """Mamba-2 (arXiv 2405.21060): H heads of P channels, state size N, B and C shared by the heads of each of G groups.

    dt_limit: bounds of Δ. Its weights are those of Hugging Face's Mamba2Mixer.
    """

    def __init__(self, C, H=None, P=64, N=64, G=1, K=4, bias=False, conv_bias=True, eps=1e-5, dt_limit=(0.0, math.inf)):
        H = H or max(1, 2 * C // P)
        E = H * P
        super().__init__(C, (E, E + 2 * G * N, H), K, (H, P, N), bias, conv_bias)
        self.parts, self.H, self.P, self.N, self.G = (E, E, G * N, G * N, H), H, P, N, G
        self.eps, self.dt_limit = eps, tuple(dt_limit)
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H))
        self.D, self.norm = nn.Parameter(torch.ones(H)), nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, C, bias=bias)

    def mix(self, x, rest, one, **state):
        E, N = self.H * self.P, self.G * self.N
        x, B, C = (a.unflatten(-1, (n, -1)) for a, n in zip(x.split([E, N, N], dim=-1), (self.H, self.G, self.G)))
        dt = F.softplus(rest.float() + self.dt_bias.float())
        if self.dt_limit != (0.0, math.inf):
            dt = dt.clamp(*self.dt_limit)
        return (ssd_step if one else ssd)(x, dt, -torch.exp(self.A_log.float()), B, C, self.D, **state)

    def gated(self, y, gate):
        y = swiglu(gate, y.flatten(-2))
        if self.G == 1:
            return rms_norm(y, self.norm, self.eps)
        y = y.unflatten(-1, (self.G, -1))                                    # each group has a length of its own
        return rms_norm(y, y.new_ones(y.shape[-1]), self.eps).flatten(-2) * self.norm


class GatedDelta(Mixer):
    """The gated delta rule (arXiv 2412.06464) as a layer: H heads, keys of K_dim and values of V_dim channels.

    k and q are brought to length 1; α = exp(−exp(A_log) softplus(a + dt_bias)), β = sigmoid(b).
    """

    def __init__(self, C, H=None, K_dim=64, V_dim=64, K=4, eps=1e-6):
        H = H or max(1, C // V_dim)
        keys, values = H * K_dim, H * V_dim
        super().__init__(C, (values, 2 * keys + values, 2 * H), K, (H, K_dim, V_dim), conv_bias=False)
        self.parts, self.H, self.keys, self.values, self.eps = (values, keys, keys, values, H, H), H, keys, values, eps
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H))
        self.norm = nn.Parameter(torch.ones(V_dim))
        self.out_proj = nn.Linear(values, C, bias=False)

    def mix(self, x, rest, one, **state):
        q, k, v = (a.unflatten(-1, (self.H, -1)) for a in x.split([self.keys, self.keys, self.values], dim=-1))
        q, k = F.normalize(q, dim=-1) * q.shape[-1] ** -0.5, F.normalize(k, dim=-1)
        b, a = rest.float().chunk(2, dim=-1)
        decay = -torch.exp(self.A_log.float()) * F.softplus(a + self.dt_bias.float())
        return (gated_delta_step if one else gated_delta)(q, k, v, decay, torch.sigmoid(b), **state)

    def gated(self, y, gate):
        return swiglu(gate, rms_norm(y, self.norm, self.eps).flatten(-2))


class MixerBlock(nn.Module):
    """A pre-norm layer without an MLP: `block(x, positions, state)` = x + `block.delta(x, positions, state)`."""

    def __init__(self, mixer, C, eps=1e-5):
        super().__init__()
        self.norm, self.mixer = RMSNorm(C, eps), mixer

    def forward(self, x, positions, state=None):
        return x + self.delta(x, positions, state)

    def delta(self, x, positions, state=None):
        return self.mixer(self.norm(x), positions, state)
