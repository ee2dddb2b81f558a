// Package message is the generated form of what goes over wire/xds: Envoy's
// delta discovery, Istio's workloads and policies, and Tacit's own pods and reports. Nobody
// but wire/xds uses it; the rest of the house speaks in the words of mesh. It
// refuses to hold a line written by hand, this one aside.
package message

//go:generate sh -c "protoc -I. --plugin=protoc-gen-go=$(go tool -n protoc-gen-go) --plugin=protoc-gen-go-grpc=$(go tool -n protoc-gen-go-grpc) --go_out=paths=source_relative:. --go-grpc_out=paths=source_relative:. discovery.proto workload.proto policy.proto node.proto"
