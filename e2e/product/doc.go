// Package product makes what Tacit is delivered as: its programs, built from the
// sources above this module, and the images of deploy/image, without a container
// runtime. The images that tests load are the images that users get.
//
// It refuses to push: that is a registry client's work.
package product
