// The activations on float vectors. Included by each instruction set's source file, inside that file's own namespace.
//
// Coefficients are least-maximum relative error fits made for this file. Every activation is x times something, or x
// divided by something, so that NaN stays NaN and -inf gives what x * act'(x) gives in PyTorch.

// e^x, to about 2 units in the last place; 0 and inf at the ends.
inline Vec exp(Vec x) {
  x = min(max(x, broadcast(-104.0f)), broadcast(89.0f));
  // Adding 1.5 * 2^23 rounds to a whole number.
  const Vec magic = broadcast(12582912.0f);
  Vec n = sub(fma(x, broadcast(1.44269504f), magic), magic);
  Vec r = fma(n, broadcast(-0.693145752f), x);  // ln 2 in two parts, the first with zeros at its end
  r = fma(n, broadcast(-1.42860677e-6f), r);
  Vec p = broadcast(1.383683772e-03f);
  p = fma(p, r, broadcast(8.374822091e-03f));
  p = fma(p, r, broadcast(4.166822605e-02f));
  p = fma(p, r, broadcast(1.666642010e-01f));
  p = fma(p, r, broadcast(4.999999208e-01f));
  p = fma(p, r, broadcast(1.000000036e+00f));
  p = fma(p, r, broadcast(1.0f));
  // 2^n in two factors, since n may be one too large or small for one.
  Vec half = sub(fma(n, broadcast(0.5f), magic), magic);
  return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)));
}

// The standard normal distribution function: e^(-x^2/2) times a fit of erfcx(z) (z + 1) in t = (z - 2) / (z + 2), where
// z = |x| / sqrt(2), on x in [-20, 0]; below that float32 has only 0.
inline Vec normal_cdf(Vec x) {
  Vec z = min(mul(abs(x), broadcast(0.707106781f)), broadcast(14.0f));
  Vec t = div(sub(z, broadcast(2.0f)), add(z, broadcast(2.0f)));
  Vec p = broadcast(5.024329767e-05f);
  p = fma(p, t, broadcast(-7.410868847e-05f));
  p = fma(p, t, broadcast(-6.217800646e-04f));
  p = fma(p, t, broadcast(1.146958954e-04f));
  p = fma(p, t, broadcast(3.895667440e-03f));
  p = fma(p, t, broadcast(-5.117577520e-04f));
  p = fma(p, t, broadcast(-2.523470231e-02f));
  p = fma(p, t, broadcast(4.253567454e-02f));
  p = fma(p, t, broadcast(3.781323744e-02f));
  p = fma(p, t, broadcast(-2.599748120e-01f));
  p = fma(p, t, broadcast(7.661870368e-01f));
  Vec density = exp(mul(mul(x, x), broadcast(-0.5f)));
  Vec tail = mul(div(mul(density, broadcast(0.5f)), add(z, broadcast(1.0f))), p);
  return where_negative(x, tail, sub(broadcast(1.0f), tail));
}

// x / (1 + e^(-k x)).
inline Vec sigmoid_gate(Vec x, Vec minus_kx) { return div(x, add(broadcast(1.0f), exp(minus_kx))); }

template <Activation A>
inline Vec activate(Vec x) {
  if constexpr (A == Activation::gelu) return mul(x, normal_cdf(x));
  if constexpr (A == Activation::gelu_tanh) {
    // 0.5 (1 + tanh(z)) = 1 / (1 + e^(-2z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
    Vec cubic = fma(mul(x, x), broadcast(-2 * 0.7978845608f * 0.044715f), broadcast(-2 * 0.7978845608f));
    return sigmoid_gate(x, mul(cubic, x));
  }
  if constexpr (A == Activation::relu) return where_negative(x, zero(), x);
  if constexpr (A == Activation::relu2) {
    Vec r = where_negative(x, zero(), x);
    return mul(r, r);
  }
  if constexpr (A == Activation::silu) return sigmoid_gate(x, sub(zero(), x));
  if constexpr (A == Activation::quick_gelu) return sigmoid_gate(x, mul(x, broadcast(-1.702f)));
}

template <Activation A>
inline void activate_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(values + i, activate<A>(load(values + i)));
}

// In place; `values` holds whole vectors.
inline void activate(Activation activation, float* values, int64_t count) {
  switch (activation) {
    case Activation::gelu:
      return activate_all<Activation::gelu>(values, count);
    case Activation::gelu_tanh:
      return activate_all<Activation::gelu_tanh>(values, count);
    case Activation::relu:
      return activate_all<Activation::relu>(values, count);
    case Activation::relu2:
      return activate_all<Activation::relu2>(values, count);
    case Activation::silu:
      return activate_all<Activation::silu>(values, count);
    case Activation::quick_gelu:
      return activate_all<Activation::quick_gelu>(values, count);
  }
}
