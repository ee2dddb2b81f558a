package build

// ModuleDir is the folder of this Go module, looked for from the working folder
// upwards.
func ModuleDir() (string, error) { return moduleDir() }
