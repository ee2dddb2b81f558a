// Package build makes the programs of a test cluster from this Go module, once:
// they are kept outside of the clone, in a folder named after a hash of all that
// they depend on. It downloads nothing but Go modules, and installs nothing: what
// Debian must give is named in an error.
package build
