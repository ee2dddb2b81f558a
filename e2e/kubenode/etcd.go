package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
)

// etcd is one member alone. etcd's own main reads its flags in a package
// initializer, so it is embedded instead.
func etcd() int {
	config := embed.NewConfig()
	config.LogLevel = "error"
	config.UnsafeNoFsync = true // a test cluster's data die with it
	client, peer := "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	cmd := &cobra.Command{Use: "etcd", SilenceUsage: true, RunE: func(*cobra.Command, []string) error {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		if err := listen(config, client, peer); err != nil {
			return err
		}
		return serve(ctx, config)
	}}
	cmd.Flags().StringVar(&config.Dir, "data-dir", "", "where the data lie")
	cmd.Flags().StringVar(&client, "listen-client-url", client, "where the API server comes")
	cmd.Flags().StringVar(&peer, "listen-peer-url", peer, "where other members would come")
	return cli.Run(cmd)
}

// listen has the config listen at, and advertise, these two.
func listen(config *embed.Config, client, peer string) error {
	c, err := url.Parse(client)
	if err != nil {
		return fmt.Errorf("--listen-client-url: %w", err)
	}
	p, err := url.Parse(peer)
	if err != nil {
		return fmt.Errorf("--listen-peer-url: %w", err)
	}
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{*c}, []url.URL{*c}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{*p}, []url.URL{*p}
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	return nil
}

func serve(ctx context.Context, config *embed.Config) error {
	e, err := embed.StartEtcd(config)
	if err != nil {
		return fmt.Errorf("etcd in %s: %w", config.Dir, err)
	}
	defer e.Close()
	select {
	case err := <-e.Err():
		return err
	case <-ctx.Done():
		return nil
	}
}
