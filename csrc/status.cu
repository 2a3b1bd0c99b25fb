// Texts of the error codes that the other files return.
#include "mvl/launch.h"

extern "C" const char* mvl_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
