#include <cstdio>

#include "runtime/version.h"

int main() {
  std::printf("lightmoe %s\n", lightmoe::version());
  return 0;
}
