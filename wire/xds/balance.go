package xds

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// affinityExtension on a Service says mesh.Service.Affinity, in seconds: Istio has
// no word for it, and its clients skip an extension that they do not know.
const affinityExtension = "tacit.dev/affinity"

// encodeReach says it in Istio's words, in which the most particular preference
// stands last.
func encodeReach(r mesh.Reach) *message.LoadBalancing {
	switch r {
	case mesh.SameNode:
		return &message.LoadBalancing{Mode: message.LoadBalancing_STRICT, RoutingPreference: []message.LoadBalancing_Scope{message.LoadBalancing_NODE}}
	case mesh.PreferNode:
		return &message.LoadBalancing{Mode: message.LoadBalancing_FAILOVER, RoutingPreference: []message.LoadBalancing_Scope{message.LoadBalancing_ZONE, message.LoadBalancing_NODE}}
	case mesh.PreferZone:
		return &message.LoadBalancing{Mode: message.LoadBalancing_FAILOVER, RoutingPreference: []message.LoadBalancing_Scope{message.LoadBalancing_ZONE}}
	}
	return nil
}

// decodeReach takes what it does not know for no preference: that is no matter of
// safety.
func decodeReach(m *message.LoadBalancing) mesh.Reach {
	node := slices.Contains(m.GetRoutingPreference(), message.LoadBalancing_NODE)
	zone := slices.Contains(m.GetRoutingPreference(), message.LoadBalancing_ZONE)
	switch strict := m.GetMode() == message.LoadBalancing_STRICT; {
	case node && strict:
		return mesh.SameNode
	case m.GetMode() != message.LoadBalancing_FAILOVER:
		return mesh.Everywhere
	case node:
		return mesh.PreferNode
	case zone:
		return mesh.PreferZone
	}
	return mesh.Everywhere
}

func encodeAffinity(d time.Duration) (*message.Extension, error) {
	config, err := anypb.New(wrapperspb.UInt32(uint32(d / time.Second)))
	return &message.Extension{Name: affinityExtension, Config: config}, err
}

func decodeAffinity(extensions []*message.Extension) (time.Duration, error) {
	for _, e := range extensions {
		if e.GetName() != affinityExtension {
			continue
		}
		var seconds wrapperspb.UInt32Value
		if err := e.GetConfig().UnmarshalTo(&seconds); err != nil {
			return 0, fmt.Errorf("extension %s: %w", affinityExtension, err)
		}
		return time.Duration(seconds.GetValue()) * time.Second, nil
	}
	return 0, nil
}
