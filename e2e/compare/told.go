package main

import (
	"context"
	"fmt"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"tacit.dev/wire/xds/message"
)

const (
	addressType = "type.googleapis.com/istio.workload.Address"
	policyType  = "type.googleapis.com/istio.security.Authorization"
	// nodeID is how a ztunnel calls itself.
	nodeID = "ztunnel~172.30.0.99~ztunnel.istio-system~istio-system.svc.cluster.local"
)

// told is what istiod tells a ztunnel.
type told struct {
	policies  map[string]*message.Authorization // by NAMESPACE/NAME
	workloads map[netip.Addr]*message.Workload
}

// ask subscribes as a ztunnel does, and returns when all of the town was told.
func ask(ctx context.Context, istiod string, t *town) (*told, error) {
	conn, err := grpc.NewClient(istiod, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := message.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx, grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	for _, kind := range []string{addressType, policyType} {
		req := &message.DeltaDiscoveryRequest{Node: &message.Node{Id: nodeID}, TypeUrl: kind, ResourceNamesSubscribe: []string{"*"}}
		if err := stream.Send(req); err != nil {
			return nil, err
		}
	}
	all := &told{make(map[string]*message.Authorization), make(map[netip.Addr]*message.Workload)}
	for !all.has(t) {
		resp, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("%w, with %d policies and %d workloads told", err, len(all.policies), len(all.workloads))
		}
		if err := all.take(resp); err != nil {
			return nil, err
		}
		if err := stream.Send(&message.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func (a *told) take(resp *message.DeltaDiscoveryResponse) error {
	for _, r := range resp.GetResources() {
		switch resp.GetTypeUrl() {
		case policyType:
			p := &message.Authorization{}
			if err := r.GetResource().UnmarshalTo(p); err != nil {
				return err
			}
			a.policies[p.GetNamespace()+"/"+p.GetName()] = p
		case addressType:
			x := &message.Address{}
			if err := r.GetResource().UnmarshalTo(x); err != nil {
				return err
			}
			for _, raw := range x.GetWorkload().GetAddresses() {
				if ip, ok := netip.AddrFromSlice(raw); ok {
					a.workloads[ip] = x.GetWorkload()
				}
			}
		}
	}
	return nil
}

// has tells whether all of the town is there.
func (a *told) has(t *town) bool {
	for i, p := range t.all() {
		if untold := i >= len(t.policies) && differences[i-len(t.policies)].untold; !untold && a.policies[key(p)] == nil {
			return false
		}
	}
	for _, p := range t.pods {
		if a.workloads[address(p)] == nil {
			return false
		}
	}
	return true
}
