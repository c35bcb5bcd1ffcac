// Command stargzd is the stargz snapshotter 0.18, a current release, run as a daemon.
//
// Built from the library, like the daemon of 0.12 beside it. The library's own service package reads the
// configuration and resolves mirrors, so hosts are tried, retried and timed out as in
// containerd-stargz-grpc: `[[resolver.host."HOST".mirrors]]` in -config. With -hosts-dir it takes its
// mirrors from hosts.toml files instead, as the plugin built into other container engines does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	"github.com/pelletier/go-toml"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
)

func main() {
	address := flag.String("address", "", "unix socket to serve the snapshots API on")
	root := flag.String("root", "", "folder for snapshots and caches")
	config := flag.String("config", "", "config.toml of containerd-stargz-grpc")
	hostsDir := flag.String("hosts-dir", "", "certs.d folder; replaces the mirrors of -config")
	level := flag.String("log-level", "info", "trace, debug, info, warn or error")
	flag.Parse()
	if err := run(*address, *root, *config, *hostsDir, *level); err != nil {
		fmt.Fprintln(os.Stderr, "stargzd:", err)
		os.Exit(1)
	}
}

func run(address, root, config, hostsDir, level string) error {
	if address == "" || root == "" {
		return errors.New("-address and -root are required")
	}
	parsed, err := logrus.ParseLevel(level)
	if err != nil {
		return err
	}
	logrus.SetLevel(parsed)
	logrus.SetFormatter(&logrus.JSONFormatter{})

	var settings service.Config
	if config != "" {
		tree, err := toml.LoadFile(config)
		if err != nil {
			return err
		}
		if err := tree.Unmarshal(&settings); err != nil {
			return fmt.Errorf("%s: %w", config, err)
		}
	}
	ctx := context.Background()
	var options []service.Option
	if hostsDir != "" {
		registry := resolver.Registry{ConfigPath: hostsDir}
		options = append(options, service.WithCustomRegistryHosts(resolver.RegistryHostsFromCRIConfig(ctx, registry)))
	}
	snapshotter, err := service.NewStargzSnapshotterService(ctx, root, &settings, options...)
	if err != nil {
		return err
	}
	// Closing unmounts every lazy mount; without it they stay behind, dead.
	defer snapshotter.Close()

	if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stop
		server.Stop()
	}()
	return server.Serve(listener)
}
