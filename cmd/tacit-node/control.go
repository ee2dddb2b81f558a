package main

import (
	"net"
	"os"
)

// controlService is where the Service of control is, as the kubelet tells containers of its
// namespace; "" if it does not. It needs nobody who answers names.
func controlService() string {
	host, port := os.Getenv("TACIT_CONTROL_SERVICE_HOST"), os.Getenv("TACIT_CONTROL_SERVICE_PORT")
	if host == "" || port == "" {
		return ""
	}
	return net.JoinHostPort(host, port)
}
