// Package message is the generated form of what goes over wire/csr: Istio's
// certificate service. Nobody but wire/csr uses it. It refuses to hold a line
// written by hand, this one aside.
package message

//go:generate sh -c "protoc -I. --plugin=protoc-gen-go=$(go tool -n protoc-gen-go) --plugin=protoc-gen-go-grpc=$(go tool -n protoc-gen-go-grpc) --go_out=paths=source_relative:. --go-grpc_out=paths=source_relative:. ca.proto"
