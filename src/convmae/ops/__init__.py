"""Operations that torch does not have, or not with a CPU's fastest kernels."""
