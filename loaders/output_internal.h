#pragma once
// Shared by output.cpp and output_directory.cpp: each step is one numbered write of set_write_fault.

#include <filesystem>

namespace lightmoe {

void before_write();
void sync_directory(const std::filesystem::path& directory);
void rename_path(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace lightmoe
