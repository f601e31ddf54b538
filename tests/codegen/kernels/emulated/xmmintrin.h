// In place of the compiler's header, whose functions do not parse under SIMDe's names.
#include "immintrin.h"
