// Package mesh gives tests a cluster that has Tacit: the images that users get,
// installed as users install them, the tests' applications and real programs
// beside it, and a witness of everything that passes between the machines.
//
// It refuses to know how Tacit works: it asks Kubernetes, the wire, and the program
// tacit.
package mesh
