"""The mathematics of MixGRPO in one notation: pure functions on tensors, no models, no devices.

Time runs as in FLUX: sigma 1 is pure noise, sigma 0 is data.

| symbol           | name in code            | meaning                                             |
|------------------|-------------------------|-----------------------------------------------------|
| T                | `steps`                 | denoising steps; step i goes from sigmas[i] to [i+1]|
| u_i = 1 - i/T    | `u`                     | uniform time                                        |
| sigma            | `sigma`                 | noise level, the shifted time u                     |
| s'               | `sigma_next`            | noise level after the step; dt = s' - sigma < 0     |
| sigma~           | `sigma_after_one`       | sigmas[1], replaces sigma where 1 - sigma is zero   |
| x                | `x`                     | latent (1 - sigma) x0 + sigma x1, [N, S, C]         |
| x'               | `x_next`                | latent after the step                               |
| v                | `v`                     | velocity x1 - x0, the model's output                |
| x0_hat, x1_hat   | `predict_data`, `_noise`| data and noise predicted from v                     |
| eta              | `eta`                   | noise level of a stochastic step                    |
| g                | `diffusion`             | diffusion coefficient of the SDE                    |
| mean, std        | `Normal`                | one stochastic step: x' ~ N(mean, std^2)            |
| D                |                         | S*C, the latent elements of one sample              |
| rho              | `ratio`, `log_ratio`    | p_new(x') / p_old(x') to the power 1/D              |
| A                | `advantages`            | advantage of a sample within its group              |
| l, w             | `Window.start`, `.size` | first step and number of steps of the window        |
| lambda, h        | `_log_snr`, `h`         | log((1-sigma)/sigma) and its increment over a step  |

Shapes: N samples per call, S tokens, C channels, B samples per iteration, P prompts. A step is
computed in float32 regardless of the model's dtype; float64 inputs stay float64.
"""
