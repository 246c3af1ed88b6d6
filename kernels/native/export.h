// The names under which one instruction set's build of the kernels is found: PD_EXPORT(linear) is `pd_avx2_linear`.
#pragma once

#define PD_JOIN(level, name) pd_##level##_##name
#define PD_NAME(level, name) PD_JOIN(level, name)
#define PD_EXPORT(name) PD_NAME(PD_LEVEL, name)
